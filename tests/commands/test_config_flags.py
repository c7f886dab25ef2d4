"""What the flags of configs do: help, printed configs, a folder of pictures as data, a workdir alone."""

import json
import shutil

import numpy as np
from PIL import Image
import pytest

from flextok_jax import config as common
from flextok_jax import evaluate, tokenize
from tests.config.test_describe import parse
from tests.support.commands import fails, run, shell

QUICK = dict(num_steps=2, log_every=1, checkpoint_every=2, eval_every=2, tensorboard=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  for label in ("cats", "dogs"):
    (folder / label).mkdir()
    for i in range(8):
      Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8)).save(folder / label / f"{i}.png")
  return folder


def flags_of(**fields):
  return [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="module")
def run_of_pictures(pictures, tmp_path_factory):
  """A workdir trained by --data alone; returns (workdir, what it printed)."""
  workdir = tmp_path_factory.mktemp("run") / "w"
  settings = flags_of(**{f"train.{name}": value for name, value in QUICK.items()}, **{"eval.num_images": 2})
  code, out, err = shell("flextok_jax.train", "--config=debug", f"--workdir={workdir}", f"--data={pictures}", *settings)
  assert code == 0, err
  return workdir, out


def test_a_folder_is_the_only_data(run_of_pictures, pictures):
  config = common.read_config(run_of_pictures[0])
  weights = {name: source.weight for name, source in config.data.sources.items()}
  assert weights == {**dict.fromkeys(weights, 0.0), "folder": 1.0}
  assert config.data.sources.folder.path == str(pictures) and config.eval.sources == ("folder",)
  assert "folder" in (run_of_pictures[0] / "metrics.jsonl").read_text()


def test_a_workdir_alone_goes_on(run_of_pictures, tmp_path):
  workdir = tmp_path / "w"
  shutil.copytree(run_of_pictures[0], workdir)
  code, out, err = shell("flextok_jax.train", f"--workdir={workdir}")
  assert code == 0 and f"resuming from step 2 of {workdir}" in out, err
  code, out, err = shell("flextok_jax.train", f"--config={workdir / 'config.json'}", f"--workdir={workdir}")
  assert code == 0 and f"resuming from step 2 of {workdir}" in out, err
  code, _, err = shell("flextok_jax.train", f"--workdir={tmp_path / 'none'}")
  assert code == 1 and err == "error: give --config=NAME and --workdir=DIR, or --workdir=DIR of a run to resume it\n"
  code, _, err = shell("flextok_jax.train", f"--config={tmp_path / 'other.json'}", f"--workdir={workdir}")
  assert code == 1 and "is not a config: among .json files, only the config.json of a run or a model is one" in err


def test_printed_configs(run_of_pictures, pictures):
  workdir = run_of_pictures[0]
  code, out, err = shell("flextok_jax.train", f"--workdir={workdir}", "--print_config")
  assert code == 0, err
  assert parse(out)["data.sources.folder.path"] == str(pictures) and parse(out)["train.num_steps"] == 2
  code, out, err = shell("flextok_jax.benchmark", "--config=debug", "--print_config", "--config.seed=7")
  assert code == 0 and parse(out)["seed"] == 7, err
  code, out, err = shell("flextok_jax.train", "--print_config")
  assert (code, err) == (1, "error: no config to print: give --config=NAME or --workdir=DIR of a run\n")


@pytest.mark.parametrize("command, has_config", [("train", True), ("sample", False)])
def test_help_lists_flags_and_fields(command, has_config):
  code, out, err = shell(f"flextok_jax.{command}", "--help")
  assert (code, err) == (0, "")
  assert out.startswith({"train": "Trains any stage", "sample": "Draws"}[command])
  assert ("encoder.width = 768" in out) == has_config
  assert "--array_record" not in out and "--alsologtostderr" not in out


def test_shards_are_of_the_data_of_the_run_or_of_a_folder(run_of_pictures, pictures, tmp_path):
  run(tokenize, f"--checkpoint={run_of_pictures[0]}", f"--out={tmp_path / 'a'}", "--split=validation")
  meta = json.loads((tmp_path / "a" / "validation" / "meta.json").read_text())
  assert meta["class_names"] == ["cats", "dogs"] and 0 < meta["num_records"] < 16
  shutil.copytree(pictures, tmp_path / "more" / "birds")
  run(tokenize, f"--checkpoint={run_of_pictures[0]}", f"--data={tmp_path / 'more'}", f"--out={tmp_path / 'b'}")
  assert json.loads((tmp_path / "b" / "train" / "meta.json").read_text())["class_names"] == ["birds"]
  fails("--images and --config are two ways", tokenize, f"--checkpoint={run_of_pictures[0]}", "--config=debug",
        f"--images={pictures}", f"--out={tmp_path / 'c'}")  # fmt: skip


def test_evaluation_on_a_folder(run_of_pictures, pictures, tmp_path):
  run(evaluate, f"--checkpoint={run_of_pictures[0]}", f"--data={pictures}", "--num_images=2", f"--out={tmp_path / 'e'}")
  assert "folder" in (tmp_path / "e" / "eval.jsonl").read_text()
  flags_of_run = [f"--workdir={run_of_pictures[0]}", "--config=debug", "--config.data.latents=L", f"--data={pictures}"]
  code, _, err = shell("flextok_jax.train", *flags_of_run)
  assert (code, err) == (1, f"error: --data={pictures} has no effect, as data.latents=L is read: give one\n")
