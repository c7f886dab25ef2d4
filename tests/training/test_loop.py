"""Whole runs of the train loop on tiny configs: what they write, and what stops them."""

import contextlib
import functools
import shutil
import signal
import types
from unittest import mock

import jax
import numpy as np
from PIL import Image
import pytest
import skimage.data

from flextok_jax import train
from flextok_jax.config import read_config, with_fields
from flextok_jax.core import errors, hub, unreadable
from flextok_jax.data import pipeline
from flextok_jax.data.sources import emoji, registry
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import goodput, loop, optim
from flextok_jax.weights import loading, saving
from tests.support.commands import shell
from tests.support.runs import (
  assert_trees_equal,
  checkpoint_steps,
  config_of,
  files_of,
  read_checkpoint,
  read_metrics,
  step_of_weights,
)
from tests.support.tiny import make_params

pytestmark = pytest.mark.usefixtures("shared_programs")

VAE = dict(
  kind="autoencoder_kl",
  latent_channels=4,
  block_out_channels=(8,),
  layers_per_block=1,
  norm_groups=4,
  scaling_factor=0.5,
)


def config_of_run(**settings):
  train_settings = dict(
    num_steps=20, log_every=4, checkpoint_every=8, eval_every=10, keep_checkpoints=2, keep_period=0, tensorboard=True
  )
  return config_of(train=train_settings | settings, sampler=dict(num_steps=1, guidance="none"))


class NoEvaluation:
  """An evaluation that measures nothing."""

  scalars: dict = {}
  run = lambda self, params: self
  write = lambda self, folder: []
  table = lambda self: ""


def train_only(config, workdir):
  """Trains without compiling an evaluation."""
  loop.train(config, str(workdir), lambda *args: (NoEvaluation(), lambda params: {}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of 20 steps with two evaluations and TensorBoard files."""
  workdir = tmp_path_factory.mktemp("run") / "a" / "workdir"
  config = config_of_run()
  train.train(config, str(workdir))
  return types.SimpleNamespace(workdir=workdir, config=config)


@pytest.fixture
def one_device():
  """Runs use one device, on which many steps of small arrays are faster."""
  make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  with mock.patch.object(sharding, "make_mesh", make_mesh):
    yield


@pytest.fixture
def sigterm_handler():
  """Installs a SIGTERM handler, as a caller of train() may."""
  handler = lambda signum, frame: None
  before = signal.signal(signal.SIGTERM, handler)
  yield handler
  signal.signal(signal.SIGTERM, before)


def test_metrics_of_a_run(run):
  lines, evals = read_metrics(run.workdir)
  assert {4, 8, 12, 16, 20} <= {x["step"] for x in lines}
  schedule = optim.make_schedule(run.config.optim, 20)
  for x in lines:
    assert all(np.isfinite(v) for v in x.values())
    assert x["loss"] > 0 and x["grad_norm"] > 0 and x["unreadable"] == 0 and x["images_per_second"] > 0
    assert {"loss_k1", "loss_k2", "loss_k4"} & set(x) and set(x) - {"step"} <= {
      "loss",
      "loss_k1",
      "loss_k2",
      "loss_k4",
      "loss_null",
      "saturation",
      "grad_norm",
      "unreadable",
      "learning_rate",
      "images_per_second",
      "eta_seconds",
      *(f"time/{kind}" for kind in goodput.KINDS),
    }
    np.testing.assert_allclose(x["learning_rate"], schedule(x["step"] - 1), rtol=1e-6)
    np.testing.assert_allclose(x["eta_seconds"], (20 - x["step"]) * 8 / x["images_per_second"], rtol=1e-6)
  assert [x["step"] for x in evals] == [10, 20]
  for x in evals:
    assert {f"eval/synthetic/{m}_{k}" for m in ("psnr", "ssim", "mae") for k in (1, 2, 4)} == set(x) - {"step"}


def test_files_of_a_run(run):
  assert checkpoint_steps(run.workdir)[-2:] == [16, 20]
  assert set(read_checkpoint(run.workdir, 20, "params")) == {"encoder", "decoder"}
  for step in (10, 20):
    folder = run.workdir / "eval" / f"{step:08d}"
    assert {p.name for p in folder.iterdir()} == {"report.json", "curve.png", "grid_synthetic.png"}
    assert Image.open(folder / "grid_synthetic.png").width > 96
    assert f"<b>step {step}</b> synthetic" in (run.workdir / "report.html").read_text()
  assert read_config(str(run.workdir)) == with_fields(run.config, {"mesh.chosen": "data 8, fsdp 1, tensor 1"})
  config, weights = loading.load(str(run.workdir / "weights.safetensors"))
  assert config.stage == "tokenizer"
  average = read_checkpoint(run.workdir, 20, "ema")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), weights, average)
  assert list((run.workdir / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_holds_the_same_numbers(run):
  from tensorboard.backend.event_processing import event_accumulator

  events = event_accumulator.EventAccumulator(str(run.workdir / "tensorboard"), {"tensors": 0}).Reload()
  lines, evals = read_metrics(run.workdir)
  for name in ("loss", "learning_rate", "eval/synthetic/psnr_4"):
    written = {
      e.step: float(np.asarray(e.tensor_proto.float_val)[0])
      if e.tensor_proto.float_val
      else float(np.frombuffer(e.tensor_proto.tensor_content, np.float32)[0])
      for e in events.Tensors(name)
    }
    expected = {x["step"]: x[name] for x in (evals if "/" in name else lines)}
    assert written == pytest.approx(expected, rel=1e-5)
  assert (
    [e.step for e in events.Tensors("eval/grid_synthetic")]
    == [e.step for e in events.Tensors("eval/curve")]
    == [10, 20]
  )


def test_rerunning_a_finished_run_does_nothing(run, capsys):
  before = files_of(run.workdir / "checkpoints"), (run.workdir / "metrics.jsonl").read_bytes()
  train.train(run.config, str(run.workdir))
  assert "nothing to do" in capsys.readouterr().out
  assert (files_of(run.workdir / "checkpoints"), (run.workdir / "metrics.jsonl").read_bytes()) == before


def test_weights_are_exported_even_if_the_run_was_killed_after_its_last_checkpoint(run):
  path = run.workdir / "weights.safetensors"
  before = loading.load(str(path))[1]
  path.unlink()
  train_only(run.config, run.workdir)
  assert_trees_equal(loading.load(str(path))[1], before)


@pytest.mark.parametrize("content", [b"", b"no safetensors file", None])
def test_weights_without_a_step_are_written_again(run, tmp_path, content):
  """A damaged file, or one that a user put there."""
  workdir = tmp_path / "copy"
  shutil.copytree(run.workdir, workdir)
  path = workdir / "weights.safetensors"
  weights = loading.load(str(path))[1]
  if content is None:
    saving.save_weights(str(path), run.config, jax.tree.map(np.zeros_like, weights))
  else:
    path.write_bytes(content)
  train_only(run.config, workdir)
  assert step_of_weights(workdir) == "20"
  assert_trees_equal(loading.load(str(path))[1], weights)


def test_an_extended_run_killed_before_its_export_replaces_the_old_weights(
  run, tmp_path, monkeypatch, capsys, sigterm_handler
):
  workdir = tmp_path / "copy"
  shutil.copytree(run.workdir, workdir)
  assert step_of_weights(workdir) == "20"
  before = (workdir / "weights.safetensors").read_bytes()

  def killed(*args, **kwargs):
    raise KeyboardInterrupt

  config = config_of_run(num_steps=28)
  monkeypatch.setattr(saving, "save_weights", killed)
  with pytest.raises(KeyboardInterrupt):
    train_only(config, workdir)
  assert signal.getsignal(signal.SIGTERM) is sigterm_handler
  assert checkpoint_steps(workdir) == [24, 28] and (workdir / "weights.safetensors").read_bytes() == before
  monkeypatch.undo()
  train_only(config, workdir)
  assert "nothing to do" not in capsys.readouterr().out
  assert step_of_weights(workdir) == "28"
  weights = loading.load(str(workdir / "weights.safetensors"))[1]
  average = read_checkpoint(workdir, 28, "ema")
  rounded = jax.tree.map(lambda x: np.asarray(x).astype("bfloat16").astype("float32"), average)
  assert_trees_equal(weights, rounded)
  train_only(config, workdir)
  assert "nothing to do" in capsys.readouterr().out
  # A shorter run than the existing one does nothing either.
  train_only(run.config, workdir)
  assert "nothing to do" in capsys.readouterr().out and step_of_weights(workdir) == "28"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_with_a_checkpoint(run, tmp_path, monkeypatch, capsys, sigterm_handler, name):
  """Ctrl-C (SIGINT) is a KeyboardInterrupt of one line; the caller's handlers are restored, and the reading ends."""
  handlers = lambda: (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
  before, make, closed = handlers(), pipeline.train_batches, []
  train_only(run.config, run.workdir)  # nothing to do
  assert handlers() == before

  def batches(*args, **kwargs):
    try:
      for i, batch in enumerate(make(*args, **kwargs)):
        if i == 4:
          signal.raise_signal(getattr(signal, name))
        yield batch
    finally:
      closed.append(True)

  monkeypatch.setattr(pipeline, "train_batches", batches)
  interrupted = pytest.raises(
    KeyboardInterrupt, match=r"^stopped by Ctrl-C at step \d; rerun the same command to go on$"
  )
  with interrupted if name == "SIGINT" else contextlib.nullcontext():
    train_only(run.config, tmp_path)
  assert handlers() == before and closed
  (step,) = checkpoint_steps(tmp_path)
  assert step < 5 and not (tmp_path / "weights.safetensors").exists()
  out = capsys.readouterr().out
  assert out.count("stopped by a signal at step") == (name == "SIGTERM")
  assert out.count("Ctrl-C: stopping after this step, with a checkpoint") == (name == "SIGINT")


def asked_for(repository, *names, needed, revision):
  raise FileNotFoundError(f"asked the hub for {repository}")


@pytest.mark.parametrize(
  "vae,init_from,error,words",
  [
    (VAE, "", ValueError, "the frozen vae needs trained weights: give config.init_from"),
    (VAE, "/absent/run", FileNotFoundError, "no such checkpoint: /absent/run"),
    ({}, "absent/vae.safetensors", FileNotFoundError, "no such checkpoint: absent/vae.safetensors"),
    (VAE, __file__, ValueError, "test_loop.py is not a whole safetensors file"),
    (VAE, "EPFL-VILAB/flextok_vae_c16", FileNotFoundError, "asked the hub for EPFL-VILAB/flextok_vae_c16"),
  ],
)
def test_a_bad_init_from_fails_before_compilation(tmp_path, monkeypatch, vae, init_from, error, words):
  spent, spending = [], goodput.Goodput.spending
  monkeypatch.setattr(goodput.Goodput, "spending", lambda self, kind: spent.append(kind) or spending(self, kind))
  monkeypatch.setattr(hub, "fetch_file", asked_for)
  with pytest.raises(error, match=words) as caught:
    train.train(config_of(vae=vae, init_from=init_from), str(tmp_path))
  assert "\n" not in str(caught.value)
  assert not spent
  assert not (tmp_path / "config.json").exists()


@pytest.mark.usefixtures("one_device")
def test_train_an_autoencoder_then_a_tokenizer_on_top(tmp_path):
  """Stage "vae" learns; a tokenizer run loads its average, keeps it frozen and outside its optimiser."""
  data = dict(global_batch=16)
  quick = dict(num_steps=40, log_every=2, checkpoint_every=40, eval_every=40)
  vae_config = config_of(stage="vae", vae=VAE, data=data, train=quick, optim=dict(learning_rate=5e-3, warmup_steps=5))
  train.train(vae_config, str(tmp_path / "vae"))
  lines, evals = read_metrics(tmp_path / "vae")
  assert np.mean([x["loss"] for x in lines[-5:]]) < 0.65 * lines[0]["loss"]
  assert {"loss", "l1", "l2", "kl"} <= set(lines[0]) and evals[-1]["eval/synthetic/psnr_vae"] > 8
  x = lines[-1]
  np.testing.assert_allclose(x["loss"], x["l1"] + vae_config.vae_loss.kl_weight * x["kl"], rtol=1e-4)

  config = config_of(
    vae=VAE, init_from=str(tmp_path / "vae"), train=dict(num_steps=3, log_every=1, checkpoint_every=3, eval_every=3)
  )
  train_only(config, tmp_path / "tokenizer")
  trained, average = read_checkpoint(tmp_path / "vae", 40, "params"), read_checkpoint(tmp_path / "vae", 40, "ema")
  frozen = read_checkpoint(tmp_path / "tokenizer", 3, "frozen")
  assert set(frozen) == {"vae"}
  assert_trees_equal(frozen, average)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(average)))
  params, opt_state = (read_checkpoint(tmp_path / "tokenizer", 3, name) for name in ("params", "opt_state"))
  assert set(params) == {"encoder", "decoder"}
  assert "vae" not in str(jax.tree_util.tree_structure(opt_state))
  _, weights = loading.load(str(tmp_path / "tokenizer"))
  assert_trees_equal(weights["vae"], average["vae"])
  # Without trained weights, a frozen autoencoder would produce noise.
  with pytest.raises(ValueError, match="vae needs trained weights: give config.init_from"):
    train.train(config_of(vae=VAE), str(tmp_path / "random"))
  with pytest.raises(ValueError, match="encoder, decoder; needed: vae|needed: vae"):
    pixels = tmp_path / "pixels.safetensors"
    saving.save_weights(str(pixels), config_of(), make_params(make_stage(config_of())))
    train.train(config_of(vae=VAE, init_from=str(pixels)), str(tmp_path / "random"))


# What stops a run.


def poisoned_batches(monkeypatch, bad_step):
  """Makes the images of one step NaN from here on."""

  make = pipeline.train_batches

  def batches(*args, start_step=0, **kwargs):
    for i, batch in enumerate(make(*args, start_step=start_step, **kwargs), start_step + 1):
      images = batch["image"].astype(np.float32) / 127.5 - 1
      yield {**batch, "image": images * (np.nan if i == bad_step else 1)}

  monkeypatch.setattr(pipeline, "train_batches", batches)


@pytest.mark.usefixtures("one_device")
def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
  config = config_of(train=dict(num_steps=20, log_every=5, checkpoint_every=10, eval_every=20))
  poisoned_batches(monkeypatch, 3)
  with pytest.raises(
    ValueError, match="not finite at step 3; there is no checkpoint yet.*with workdir=NEW optim.learning_rate=0.0005"
  ):
    train_only(config, tmp_path / "early")
  assert not checkpoint_steps(tmp_path / "early")

  workdir = tmp_path / "run"
  monkeypatch.undo()
  poisoned_batches(monkeypatch, 13)
  with pytest.raises(ValueError, match="not finite at step 13; the checkpoint of step 10 is untouched") as error:
    train_only(config, workdir)
  assert "\n" not in str(error.value)
  assert f"same command with workdir=NEW init_from={workdir}/checkpoints/10 optim.learning_rate=" in str(error.value)
  assert_trees_equal(loading.load(f"{workdir}/checkpoints/10")[1], read_checkpoint(workdir, 10, "ema"))
  assert checkpoint_steps(workdir) == [10] and not (workdir / "weights.safetensors").exists()
  lines, _ = read_metrics(workdir)
  assert [x["step"] for x in lines] == [5, 10] and "NaN" not in (workdir / "metrics.jsonl").read_text()
  for name in ("params", "ema", "opt_state"):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(read_checkpoint(workdir, 10, name)))
  good = files_of(workdir / "checkpoints" / "10")
  with pytest.raises(ValueError, match="not finite at step 13; the checkpoint of step 10 is untouched"):
    train_only(config, workdir)
  assert files_of(workdir / "checkpoints" / "10") == good
  monkeypatch.undo()  # the cause is removed: the run continues
  train_only(config, workdir)
  assert checkpoint_steps(workdir) == [10, 20]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """60 JPEG files in two classes, every sixth truncated, and two undamaged ones for evaluation."""
  folder, photo = tmp_path_factory.mktemp("pictures"), skimage.data.astronaut()
  for i in range(62):
    path = folder / ("val" if i >= 60 else "train") / ("even", "odd")[i % 2] / f"{i}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo[i * 5 : i * 5 + 64, 100:190]).save(path)
    if i % 6 == 0 and i < 60:
      path.write_bytes(path.read_bytes()[:300])
  return folder


def folder_config(pictures, max_unreadable, **settings):
  sources = dict(
    synthetic=dict(weight=0.0), folder=dict(weight=1.0, path=str(pictures / "train"), val_path=str(pictures / "val"))
  )
  return config_of(
    data=dict(sources=sources, max_unreadable=max_unreadable),
    eval=dict(sources=("folder",)),
    train=dict(num_steps=20, **settings),
  )


def test_a_few_unreadable_files_are_skipped_and_counted(pictures, tmp_path):
  train_only(folder_config(pictures, 0.5, log_every=4), tmp_path)
  lines, _ = read_metrics(tmp_path)
  assert 20 <= sum(x["unreadable"] for x in lines) <= 40  # one file in six; 160 images


def test_the_unreadable_fraction_covers_all_images_since_the_last_check(pictures, tmp_path):
  """An evaluation in between does not shorten the interval."""
  train_only(folder_config(pictures, 0.5, log_every=20, eval_every=19, checkpoint_every=20), tmp_path)


def test_a_single_unreadable_file_of_a_small_folder_stops_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(unreadable, "_met", set())
  folder = tmp_path / "pictures"
  folder.mkdir()
  for i in range(6):
    Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(folder / f"{i}.png")
  (folder / "3.png").write_bytes(b"broken")
  sources = dict(synthetic=dict(weight=0.0), folder=dict(weight=1.0, path=str(folder), val_path=str(tmp_path / "val")))
  config = config_of(data=dict(sources=sources), train=dict(num_steps=4, log_every=4))
  train_only(config, tmp_path / "run")
  lines, _ = read_metrics(tmp_path / "run")
  assert lines[-1]["unreadable"] >= 4  # of 32 images
  config.data.max_unreadable = 0.0
  config.train.num_steps = 8
  with pytest.raises(ValueError, match="of the last 32 images are unreadable"):
    train_only(config, tmp_path / "run")


def test_a_run_without_the_emoji_font_says_what_it_was_trained_on(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(emoji, "FONT_PATHS", ())
  monkeypatch.setattr(errors, "_warned", set())
  config = config_of(
    data=dict(sources=dict(emoji=dict(weight=0.5))), eval=dict(sources=("synthetic", "emoji")), train=dict(num_steps=2)
  )
  train_only(config, tmp_path)
  found = read_config(tmp_path)
  assert (found.data.sources.emoji.weight, found.eval.sources) == (0.0, ("synthetic",))
  assert "source 'emoji' is left out: NotoColorEmoji.ttf was not found" in caplog.text
  config.train.num_steps = 4
  train_only(config, tmp_path)
  assert step_of_weights(tmp_path) == "4"
  monkeypatch.setitem(registry.OPTIONAL, "emoji", lambda: None)
  with pytest.raises(ValueError, match="set data.sources.emoji.weight=0.0"):
    train_only(config, tmp_path)


def test_too_many_unreadable_files_stop_the_run(pictures, tmp_path):
  config = folder_config(pictures, 0.05, log_every=4)
  with pytest.raises(ValueError, match=r"\d of the last 32 images are unreadable.*max_unreadable=0.05") as error:
    train_only(config, tmp_path)
  assert "\n" not in str(error.value)


def test_training_runs_without_tensorflow(tmp_path):
  """In a user process in which tensorflow cannot be imported: console and JSON lines, and one message about it."""
  code, out, err = shell(
    "tests.support.without_tensorflow",
    "--config=configs/debug.py",
    f"--workdir={tmp_path}",
    "--config.train.num_steps=2",
    "--config.train.log_every=1",
    "--config.train.tensorboard=True",
    "--config.eval.num_tokens=(4,)",
    "--config.sampler.num_steps=1",
    "--config.sampler.guidance=none",
  )
  assert code == 0, err
  assert out.count("loss") == 2 and (out + err).count("TensorBoard") == 1
  lines, evals = read_metrics(tmp_path)
  assert [x["step"] for x in lines] == [1, 2] and len(evals) == 1
  assert not (tmp_path / "tensorboard").exists()
