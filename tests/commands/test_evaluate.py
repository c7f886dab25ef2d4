"""Evaluation as its users run it: networks' metrics, devices and processes, interruptions, samples."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys

import jax
from jax.tree_util import Partial
import numpy as np
import pytest

from flextok_jax import evaluate
from flextok_jax.evals import progress, reconstruction
from flextok_jax.evals.metrics import frechet as statistics
from flextok_jax.evals.metrics import measures
from flextok_jax.evals.metrics import samples as sample_metrics
from flextok_jax.stages import make_stage
from flextok_jax.weights import saving
from tests.support.commands import ROOT, environment, fails, run
from tests.support.tiny import make_params, tiny_config

FEATURES = np.random.default_rng(5).normal(size=(16 * 16 * 3, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def stage():
  return make_stage(tiny_config())


@pytest.fixture(scope="module")
def params(stage):
  return make_params(stage)


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3)).astype(np.uint8)


def features(images):
  return {"pool": images.reshape(len(images), -1) @ FEATURES}


def make(stage, images, batch_size=4, **options):
  return reconstruction.Reconstruction(
    stage.predict_fns,
    {"set": images},
    (1, 4),
    batch_size,
    seed=3,
    grid_images=2,
    measures=measures.make(("psnr", "perceptual")),
    features=Partial(features),
    **options,
  )


@pytest.fixture(scope="module")
def scores(stage, params, images):
  return make(stage, images).run(params).scores["sets"]["set"]


def assert_same(scores, expected):
  assert scores["num_images"] == expected["num_images"]
  for part in ("by_tokens", "intervals"):
    assert scores[part].keys() == expected[part].keys()
    for column, values in expected[part].items():
      assert scores[part][column].keys() == values.keys()
      for metric, value in values.items():
        np.testing.assert_allclose(scores[part][column][metric], value, rtol=1e-4, err_msg=f"{column} {metric}")


def test_rfid_and_means_are_those_of_the_pictures(stage, params, images, scores):
  """By the pictures themselves, all at once, and plain formulas."""
  report = reconstruction.Reconstruction(
    stage.predict_fns, {"set": images}, (1, 4), 11, seed=3, grid_images=11, measures=measures.make(("psnr",))
  )
  pictures = report.run(params).examples["set"]
  for column in ("1", "4"):
    a, b = (features(pictures[name].astype(np.float64) / 255)["pool"] for name in ("original", column))
    rfid = statistics.frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    np.testing.assert_allclose(scores["by_tokens"][column]["rfid"], rfid, rtol=1e-4)
    mse = np.square((pictures["original"].astype(float) - pictures[column]) / 255).mean((1, 2, 3))
    np.testing.assert_allclose(scores["by_tokens"][column]["psnr"], (-10 * np.log10(mse)).mean(), rtol=1e-5)
    low, high = sample_metrics.bootstrap_interval(-10 * np.log10(mse))
    np.testing.assert_allclose(scores["intervals"][column]["psnr"], [low, high], rtol=1e-5)
    assert low < scores["by_tokens"][column]["psnr"] < high


def test_devices_and_batches_change_nothing(stage, params, images, scores):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
  many = make(stage, images, sharding=jax.NamedSharding(mesh, jax.P("data"))).run(placed)
  assert_same(many.scores["sets"]["set"], scores)
  assert_same(make(stage, images, 11).run(params).scores["sets"]["set"], scores)


class Killed(Exception):
  pass


class Reader:
  """Images that are there until a time comes."""

  def __init__(self, images, reads):
    self._images, self._reads, self.shape = images, reads, images.shape

  def __getitem__(self, rows):
    self._reads -= 1
    if self._reads < 0:
      raise Killed
    return self._images[rows]


def test_what_was_done_is_not_done_again(stage, params, images, scores, tmp_path, capsys):
  keep = lambda settings: progress.Progress(tmp_path / "kept", settings, every=1)
  with pytest.raises(Killed):
    make(stage, Reader(images, 2), progress=keep({"a": 1})).run(params)
  (kept,) = (tmp_path / "kept").iterdir()
  before = kept.read_bytes()
  report = make(stage, Reader(images, 3), progress=keep({"a": 1})).run(params)  # two batches, and the grid
  assert "set: going on after 4 images" in capsys.readouterr().out
  assert_same(report.scores["sets"]["set"], scores)
  assert len(report.examples["set"]["4"]) == 2

  kept.write_bytes(before)
  with pytest.raises(Killed):  # of other settings: everything is read again
    make(stage, Reader(images, 2), progress=keep({"a": 2})).run(params)
  assert "of other settings or weights: set begins anew" in capsys.readouterr().out
  kept.write_bytes(before[:-30])
  assert_same(make(stage, images, progress=keep({"a": 1})).run(params).scores["sets"]["set"], scores)
  assert "is damaged: set begins anew" in capsys.readouterr().out
  keep({"a": 1}).clear()
  assert not (tmp_path / "kept").exists()


def test_identity_tells_weights_apart(params):
  other = jax.tree.map(np.array, params)
  assert progress.identity(params) == progress.identity(other)
  jax.tree.leaves(other)[3].flat[0] += 1e-6
  assert progress.identity(params) != progress.identity(other)


# The command.


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


def test_a_killed_evaluation_goes_on(model, whole, tmp_path, capsys):
  given = [f"--checkpoint={model}", "--metrics=psnr,mse", "--num_tokens=1,4", "--keep_every=1", f"--out={tmp_path}"]
  done = subprocess.run(
    [sys.executable, "-c", KILLED, *given], cwd=ROOT, env=environment(8), capture_output=True, text=True, check=False
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert not (tmp_path / "report.json").exists()
  run(evaluate, *given)
  assert "going on after 16 images" in capsys.readouterr().out  # batches of 8, one a device
  assert_same(scored(tmp_path), scored(whole))
  assert not (tmp_path / "so_far").exists()


def test_two_processes(model, whole, tmp_path):
  """Three devices in all: the batches differ from those of one process."""
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
  assert_same(scored(tmp_path), scored(whole))
  assert done.stdout.count("21 of 21 images") == 1


def test_bad_flags_are_refused_in_one_line(model, tmp_path):
  given = f"--checkpoint={model}", f"--out={tmp_path / 'out'}"
  fails("unknown metric 'fid': one of psnr, .*lpips_alex", evaluate, *given, "--metrics=fid")
  for metric, name in (("rfid", "inception"), ("lpips_vgg", "lpips_vgg"), ("dreamsim", "dreamsim"), ("dinov2",) * 2):
    fails(f"metric {metric} needs weights, a folder with {name}: ", evaluate, *given, f"--metrics={metric}")
    fails(
      f"metric {metric}: {tmp_path} has no {name}.safetensors, .npz or folder: put there ",
      evaluate,
      *given,
      f"--metrics={metric}",
      f"--weights={tmp_path}",
    )
  assert not (tmp_path / "out").exists()
