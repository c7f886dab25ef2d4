"""Where a run writes: TensorBoard and Weights & Biases; report.html is in test_run_report.py."""

import contextlib
import json
import struct

from etils import epath
import numpy as np
from PIL import Image
import pytest

from flextok_jax.config import check_field
from flextok_jax.core import extras
from flextok_jax.training import loop, writers
from tests.support.runs import config_of, read_metrics

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def write(workdir, steps, picture_at, **train):
  """Opens a run's outputs, and writes a loss at each step and an evaluation with a picture at one of them."""
  workdir.mkdir(exist_ok=True)
  Image.fromarray(PIXELS).save(workdir / "grid_x.png")
  config = config_of(train=dict(num_steps=9, tensorboard=False) | train)
  with contextlib.closing(writers.Writer(config, epath.Path(workdir), workdir)) as writer:
    for step in steps:
      writer.write(step, {"loss": 1.0 / step}, f"step {step}")
      if step == picture_at:
        writer.write(step, {"eval/x/psnr_1": 20.0}, "evaluated", [workdir / "grid_x.png"])


def test_tensorboard_shows_pictures(tmp_path):
  from tensorboard.backend.event_processing import event_accumulator

  write(tmp_path, [1, 2], 2, tensorboard=True)
  events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0}).Reload()
  assert {"loss", "eval/x/psnr_1", "eval/grid_x"} <= set(events.Tags()["tensors"])
  (event,) = events.Tensors("eval/grid_x")
  width, height, png = event.tensor_proto.string_val
  assert (event.step, width, height) == (2, b"6", b"4") and png.startswith(b"\x89PNG")


def records(folder):
  """Yields the records of a run that Weights & Biases stored offline: blocks of LevelDB's log format."""
  from wandb.proto import wandb_internal_pb2

  (path,) = folder.glob("*.wandb")
  data, position = path.read_bytes(), 7
  while position + 7 <= len(data):
    _, size, kind = struct.unpack_from("<IHB", data, position)
    assert kind == 1  # a whole record
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data[position + 7 : position + 7 + size])
    yield record
    position += 7 + size


def test_weights_and_biases_offline(tmp_path, monkeypatch):
  """A resumed run has the same id, and may log a step again."""
  wandb = pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  workdir = tmp_path / "my_run"
  runs, seen = [], set()
  for steps in ([1, 2, 3], [3, 4]):
    write(workdir, steps, 3, wandb="my-project")
    wandb.teardown()  # its process may still be writing
    (folder,) = set((workdir / "wandb").glob("offline-run-*")) - seen
    seen.add(folder)
    found = list(records(folder))
    (run,) = (record.run for record in found if record.HasField("run"))
    assert (run.project, run.display_name) == ("my-project", "my_run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train.num_steps"] == 9
    runs.append(run.run_id)
    history = [
      {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
      for record in found
      if record.HasField("history")
    ]
    assert [x["step"] for x in history if "loss" in x] == steps
    (evaluated,) = (x for x in history if "eval/x/psnr_1" in x)
    assert evaluated["step"] == 3 and evaluated["eval/grid_x/width"] == 6
    assert len(list(folder.glob("files/media/images/eval/grid_x*.png"))) == 1
  assert runs[0] == runs[1] == (workdir / writers.WANDB_ID).read_text()
  lines, evals = read_metrics(workdir)
  assert [x["step"] for x in lines] == [1, 2, 3, 3, 4] and len(evals) == 2


def test_weights_and_biases_without_its_package_or_an_account(tmp_path, monkeypatch):
  """One line says what to do, and the first before anything is written."""
  config = config_of(train=dict(wandb="p"))
  with monkeypatch.context() as patched:
    patched.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
      extras.MissingPackageError, match=r"^train.wandb=p needs wandb: pip install 'flextok-jax\[wandb"
    ):
      loop.train(config, str(tmp_path / "run"))
  assert not list(tmp_path.iterdir())

  import wandb

  def refuse(**options):
    raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

  monkeypatch.setattr(wandb, "init", refuse)
  with pytest.raises(ValueError, match=r"^train.wandb=p cannot be used \(No API key configured.\): run wandb login, "):
    write(tmp_path, [1], 1, wandb="p")


@pytest.mark.parametrize("project", ["a/b", "a%", "x" * 129])
def test_a_bad_project(project):
  with pytest.raises(ValueError, match="train.wandb .*a project's name of at most 128 characters"):
    check_field("train.wandb", project)
