"""Bad input to the train command: a one-line error, exit code 1, and no file changed.

Most cases call train() in this process and check its error; test_errors_print_one_line_and_exit_with_code_1 checks how
it is printed. Cases of the command line itself run as a user's process. Other commands: test_commands.py.
"""

from pathlib import Path
import re

import numpy as np
from PIL import Image
import pytest

from flextok_jax import train
from flextok_jax.configs import debug
from flextok_jax.training import checkpoint
from tests.support.commands import shell

ROOT = Path(__file__).parents[2]
PART = dict(width=32, depth=1, head_dim=16, patch_size=4)


def config_of(**overrides):
  c = debug.get_config()
  c.update(overrides)
  return c


def sources(**settings):
  return dict(sources=dict(synthetic=dict(weight=0.0)) | settings)


def files_of(folder):
  """Returns the contents of all files, except the run's lock, which is not removed."""
  files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"]
  return {path: path.read_bytes() for path in files}


def refused(pattern, workdir, **overrides):
  """Asserts that train() raises a one-line error of a kind that cli.run prints, before it writes anything."""
  workdir = Path(workdir)
  before = files_of(workdir) if workdir.is_dir() else {}
  with pytest.raises((ValueError, OSError), match=pattern) as error:
    train.train(config_of(**overrides), str(workdir))
  line = str(error.value)
  assert line and "\n" not in line and len(line) < 500, line
  assert (files_of(workdir) if workdir.is_dir() else {}) == before


@pytest.mark.parametrize(
  "pattern, overrides",
  [
    # Sizes.
    ("image_size 2 gives 2 latent pixels per side.*encoder.patch_size 4", dict(image_size=2)),
    ("image_size 18 .*not a multiple of encoder.patch_size 4", dict(image_size=18)),
    ("image_size must be a whole number from 1 to 4096, got 0", dict(image_size=0)),
    ("images of 8x8 px are smaller than SSIM's window", dict(image_size=8)),
    ("encoder.width 40 .*head_dim 16", dict(encoder=PART | dict(width=40))),
    ("decoder.width 36 .*head_dim 16", dict(decoder=PART | dict(width=36))),
    ("encoder.head_dim", dict(encoder=PART | dict(head_dim=0))),
    ("decoder.patch_size", dict(decoder=PART | dict(patch_size=0))),
    ("decoder.depth", dict(decoder=PART | dict(depth=0))),
    ("tokens.num_registers must be a whole number from 1 to 65536, got 0", dict(tokens=dict(num_registers=0))),
    ("tokens.levels", dict(tokens=dict(levels=(8, 1)))),
    ("tokens.levels", dict(tokens=dict(levels=()))),
    ("tokens.levels must be .* with a product of at most 2147483647", dict(tokens=dict(levels=(2**15, 2**16)))),
    (
      "image_size 18 is not a multiple of the VAE's downscale 4",
      dict(image_size=18, vae=dict(kind="autoencoder_kl", block_out_channels=(8, 8, 8), norm_groups=4)),
    ),
    # Names.
    ("stage must be one of tokenizer, vae, ar, distill, got 'tokeniser'", dict(stage="tokeniser")),
    ("stage 'vae' trains vae.kind 'autoencoder_kl', got 'pixels'", dict(stage="vae")),
    ("vae.kind must be one of autoencoder_kl, pixels, got 'vqgan'", dict(vae=dict(kind="vqgan"))),
    ("tokens.nested_dropout must be one of uniform, pow2, .*, got 'pow3'", dict(tokens=dict(nested_dropout="pow3"))),
    ("'pow2' needs a power of two, got 6", dict(tokens=dict(num_registers=6))),
    ("flow.t_sampling must be one of logit_normal, .*, got 'lognormal'", dict(flow=dict(t_sampling="lognormal"))),
    ("sampler.guidance must be one of apg, cfg, none, got 'cgf'", dict(sampler=dict(guidance="cgf"))),
    ("dtype.*float31", dict(dtype="float31")),
    ("export_dtype.*float7", dict(train=dict(export_dtype="float7"))),
    ("eval.sources must be a tuple of names of .*tfds.*, got .*'mars'", dict(eval=dict(sources=("mars",)))),
    ("data.crop must be one of random, center, got 'left'", dict(data=dict(crop="left"))),
    # Counts.
    ("global_batch=12 is not divisible by 8 devices", dict(data=dict(global_batch=12))),
    ("global_batch=8 is not divisible by 8 devices x accumulate_steps=2", dict(optim=dict(accumulate_steps=2))),
    ("accumulate_steps", dict(optim=dict(accumulate_steps=0))),
    ("data.global_batch must be a whole number from 1", dict(data=dict(global_batch=0))),
    ("mesh.tensor=4 does not divide the 2 heads of the encoder", dict(mesh=dict(tensor=4))),
    ("the encoder, at most 512: lower it", dict(image_size=2048, encoder=PART | dict(patch_size=2))),
    ("mesh of data=3, fsdp=-1, tensor=1 does not match the 8 devices", dict(mesh=dict(data=3))),
    ("num_tokens=5 is out of range: this model takes 1 to 4", dict(eval=dict(num_tokens=(1, 5)))),
    ("eval.num_tokens must be a tuple of whole numbers from 1 .*, got .*0", dict(eval=dict(num_tokens=(0,)))),
    ("no evaluation set is named", dict(eval=dict(sources=()))),
    ("eval.num_images must be a whole number from 1 to 2147483647, got 0", dict(eval=dict(num_images=0))),
    ("eval.batch_size", dict(eval=dict(batch_size=0))),
    ("train.log_every must be a whole number from 1 to 2147483647, got 0", dict(train=dict(log_every=0))),
    ("train.checkpoint_every", dict(train=dict(checkpoint_every=0))),
    ("train.eval_every", dict(train=dict(eval_every=0))),
    ("train.keep_checkpoints", dict(train=dict(keep_checkpoints=0))),
    ("sampler.num_steps", dict(sampler=dict(num_steps=0))),
    # Weights to start from (others: tests/training/test_checkpoint.py).
    ("setup.py is not a whole safetensors file", dict(init_from=str(ROOT / "setup.py"))),
    # No data.
    ("set data.sources.folder.path", dict(data=sources(folder=dict(weight=1.0)))),
    ("no data source has a weight above 0", dict(data=sources())),
    (
      "data.sources.folder.path='/x' is not read, .*set data.sources.folder.weight=1, or give --data=DIR",
      dict(data=dict(sources=dict(folder=dict(path="/x")))),
    ),
  ],
)
def test_bad_settings_are_refused(pattern, overrides, tmp_path):
  refused(pattern, tmp_path / "new", **overrides)


@pytest.mark.parametrize("held_out", [True, False])
def test_bad_folders_are_refused(held_out, tmp_path):
  """The bad folder is used for training, or for training and evaluation."""
  (tmp_path / "empty" / "class").mkdir(parents=True)
  (tmp_path / "empty" / "class" / "notes.txt").write_text("no picture")
  (tmp_path / "broken").mkdir()
  for i in range(50):
    (tmp_path / "broken" / f"{i}.jpg").write_bytes(b"no picture")
  evaluation = dict(sources=("folder",) if held_out else ("synthetic",))
  folder = lambda path: dict(data=sources(folder=dict(weight=1.0, path=str(path))), eval=evaluation)
  workdir = tmp_path / "new"
  refused(f"folder {tmp_path}/absent does not exist", workdir, **folder(tmp_path / "absent"))
  refused(f"folder {tmp_path}/empty has no picture", workdir, **folder(tmp_path / "empty"))
  refused("notes.txt is a file, not a folder", workdir, **folder(tmp_path / "empty" / "class" / "notes.txt"))
  if held_out:
    refused("consecutive images are unreadable", workdir, **folder(tmp_path / "broken"))


def test_workdir_of_another_config_or_not_a_folder_is_refused(tmp_path):
  checkpoint.claim_workdir(str(tmp_path / "run"), config_of())
  (tmp_path / "run" / "metrics.jsonl").write_text("precious\n")
  refused("belongs to another config: seed is 0 there and 1 here; use another workdir", tmp_path / "run", seed=1)
  refused(
    "belongs to another config: stage is",
    tmp_path / "run",
    stage="vae",
    vae=dict(kind="autoencoder_kl", block_out_channels=(8,), norm_groups=4),
    seed=0,
  )
  (tmp_path / "file").write_text("precious")
  refused("file", tmp_path / "file")
  refused("file", tmp_path / "file" / "below")
  assert (tmp_path / "file").read_text() == "precious"
  (tmp_path / "run" / "config.json").write_text("{")
  refused("config.json is not JSON", tmp_path / "run")


# As a user runs it.


DEBUG = "--config=configs/debug.py"


@pytest.mark.parametrize(
  "pattern, args",
  [
    ("unknown config key .*--config.a.bogus=1", [DEBUG, "--config.a.bogus=1"]),
    ("unknown config key .*--config.data.sources.mars.weight=1", [DEBUG, "--config.data.sources.mars.weight=1"]),
    ("absent.py", ["--config=configs/absent.py"]),
    ("get_config", ["--config={tmp}/empty.py"]),
    ("broken.py", ["--config={tmp}/broken.py"]),
    ("config.image_size|invalid literal|abc", [DEBUG, "--config.image_size=abc"]),
    ("seed must be a whole number from 0 to 4294967295, got 9", [DEBUG, "--config.seed=99999999999999999999"]),
    ("unexpected argument 'configs/debug.py'", ["configs/debug.py"]),
    ("Unknown command line flag 'work_dir'", [DEBUG, "--work_dir=x"]),
    ("give --config=NAME and --workdir=DIR", []),
    ("give --config=NAME and --workdir=DIR", [DEBUG, "--workdir="]),
  ],
)
def test_bad_command_lines_are_refused(pattern, args, tmp_path):
  (tmp_path / "empty.py").write_text("")
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  workdir = [] if "--workdir=" in args else [f"--workdir={tmp_path / 'new'}"]
  args = [arg.format(tmp=tmp_path) for arg in args] + (workdir if args else [])
  one_line(pattern, *shell("flextok_jax.train", *args))
  assert not (tmp_path / "new").exists()


def one_line(pattern, code, printed, err):
  assert (code, printed) == (1, ""), (code, printed, err)
  assert err.startswith("error: ") and re.search(pattern, err) and len(err.splitlines()) == 1, err


def test_errors_print_one_line_and_exit_with_code_1(tmp_path):
  """Errors inside train(): before the first step, and during training, while reader threads are running."""
  one_line(
    "the image folder /absent does not exist",
    *shell(
      "flextok_jax.train",
      DEBUG,
      f"--workdir={tmp_path}",
      "--config.data.sources.synthetic.weight=0",
      "--config.data.sources.folder.weight=1",
      "--config.data.sources.folder.path=/absent",
    ),
  )
  assert not files_of(tmp_path)
  for i in range(64):
    path = tmp_path / "pictures" / f"{i}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), 4 * i, np.uint8)).save(path)
    if i % 3 == 0:
      path.write_bytes(path.read_bytes()[:50])
  code, _, err = shell(
    "flextok_jax.train",
    DEBUG,
    f"--workdir={tmp_path / 'new'}",
    "--config.data.sources.synthetic.weight=0",
    "--config.data.sources.folder.weight=1",
    f"--config.data.sources.folder.path={tmp_path / 'pictures'}",
  )
  lines = err.splitlines()
  assert code == 1 and lines[-1].startswith("error: ") and "data.max_unreadable=0.01" in lines[-1]
  assert all("Skipped unreadable image" in line for line in lines[:-1]) and "Traceback" not in err
