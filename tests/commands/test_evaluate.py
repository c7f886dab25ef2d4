"""The evaluate command on reconstructions: several processes, interruptions, bad flags."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys

from PIL import Image
import pytest

from flextok_jax import evaluate
from flextok_jax.core import errors
from flextok_jax.data.sources import emoji
from flextok_jax.stages import make_stage
from flextok_jax.weights import saving
from tests.support.commands import ROOT, environment, fails, run
from tests.support.scores import assert_same_scores
from tests.support.tiny import make_params, tiny_config


@pytest.fixture(scope="module")
def params():
  return make_params(make_stage(tiny_config()))


@pytest.fixture(scope="module")
def model(params, tmp_path_factory):
  config = tiny_config(eval=dict(sources=("synthetic",), num_images=21, batch_size=4, grid_images=2))
  path = tmp_path_factory.mktemp("model") / "weights.safetensors"
  saving.save_weights(str(path), config, params)
  return path


def scored(out):
  return json.loads((out / "report.json").read_text())["sets"]["synthetic"]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
  out = tmp_path_factory.mktemp("whole")
  run(evaluate, f"--checkpoint={model}", "--metrics=psnr,mse", "--num_tokens=1,4", f"--out={out}")
  return out


def test_sets_that_are_missing_are_left_out(model, whole, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(emoji, "FONT_PATHS", ())
  monkeypatch.setattr(errors, "_warned", set())
  given = f"--checkpoint={model}", "--metrics=psnr,mse", "--num_tokens=1,4", f"--out={tmp_path}"
  run(evaluate, *given, "--sources=emoji,synthetic")
  assert "source 'emoji' is left out: " in caplog.text
  assert_same_scores(scored(tmp_path), scored(whole))
  fails("fonts-noto-color-emoji", evaluate, *given, "--sources=emoji")


def test_all_images_of_a_folder_are_measured(model, tmp_path):
  folder, few = tmp_path / "pictures", ("--num_tokens=4", "--num_images=3")
  (folder / "class").mkdir(parents=True)
  for i in range(5):
    Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(folder / "class" / f"{i}.png")
  given = f"--checkpoint={model}", f"--images={folder}"
  run(evaluate, *given, "--num_tokens=4", f"--out={tmp_path / 'all'}")
  run(evaluate, *given, *few, f"--out={tmp_path / 'few'}")
  counts = [json.loads((tmp_path / out / "report.json").read_text())["sets"]["folder"] for out in ("all", "few")]
  assert [found["num_images"] for found in counts] == [5, 3]
  fails("--images=.* and --sources are both given", evaluate, *given, "--sources=synthetic", f"--out={tmp_path / 'c'}")
  fails("no.*such.*nowhere|nowhere", evaluate, given[0], "--images=nowhere", f"--out={tmp_path / 'd'}")


KILLED = """
import os, signal, sys
from absl import flags
from flextok_jax import cli, evaluate
from flextok_jax.evals import progress
after = progress.Progress.after_batch

def stop(self, part, done, *args):
  after(self, part, done, *args)
  if done >= 12:
    os.kill(os.getpid(), signal.SIGKILL)

progress.Progress.after_batch = stop
evaluate.define_flags()
cli.run(lambda: evaluate.main(flags.FLAGS))
"""


def test_killed_evaluation_resumes(model, whole, tmp_path, capsys):
  given = [f"--checkpoint={model}", "--metrics=psnr,mse", "--num_tokens=1,4", "--keep_every=1", f"--out={tmp_path}"]
  done = subprocess.run(
    [sys.executable, "-c", KILLED, *given], cwd=ROOT, env=environment(8), capture_output=True, text=True, check=False
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert not (tmp_path / "report.json").exists()
  run(evaluate, *given)
  assert "resuming after 16 images" in capsys.readouterr().out  # batches of 8, one per device
  assert_same_scores(scored(tmp_path), scored(whole))
  assert not (tmp_path / "so_far").exists()


def test_two_processes(model, whole, tmp_path):
  """Three devices in total, so the batches differ from those of one process."""
  command = [
    "python",
    "-m",
    "flextok_jax.evaluate",
    f"--checkpoint={model}",
    "--metrics=psnr,mse",
    "--num_tokens=1,4",
    f"--out={tmp_path}",
  ]
  env = environment(2, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  done = subprocess.run(
    ["bash", "launch/local.sh", "2", *command],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert_same_scores(scored(tmp_path), scored(whole))
  assert done.stdout.count("eval.jsonl") == 1  # one process prints


def test_bad_flags_are_one_line_errors(model, tmp_path):
  given = f"--checkpoint={model}", f"--out={tmp_path / 'out'}"
  fails("unknown metric 'fid': one of psnr, .*lpips_alex", evaluate, *given, "--metrics=fid")
  for metric, name in (("rfid", "inception"), ("lpips_vgg", "lpips_vgg"), ("dreamsim", "dreamsim"), ("dinov2",) * 2):
    fails(f"metric {metric!r} needs weights=DIR, a folder with {name}: ", evaluate, *given, f"--metrics={metric}")
    fails(
      f"metric {metric}: {tmp_path} has no {name}.safetensors, .npz or folder: put there ",
      evaluate,
      *given,
      f"--metrics={metric}",
      f"--weights={tmp_path}",
    )
  assert not (tmp_path / "out").exists()
