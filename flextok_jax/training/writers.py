"""Where a run writes its metrics and pictures: console, metrics.jsonl, report.html, TensorBoard, Weights & Biases."""

from collections.abc import Mapping, Sequence
import contextlib
import os
from pathlib import Path
import secrets
import sys
from typing import Any, Protocol

from etils import epath
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from flextok_jax.config import flatten
from flextok_jax.core import extras, files, json_lines, progress
from flextok_jax.core.errors import first_line
from flextok_jax.parallel import processes
from flextok_jax.training.run_report import RunReport, run_name

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"
FETCH = (METRICS, WANDB_ID)  # files of a workdir in a bucket that are read or appended to


class Output(Protocol):
  """A place that metrics and pictures are written to."""

  def write(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Path]) -> None:
    """Writes the scalars of a step, and pictures, PNG files; OSError if that fails."""

  def close(self) -> None:
    """Writes what is left."""


class Writer:
  """Writes the metrics of a run to the console and, on process 0, to metrics.jsonl and all other outputs.

  Args:
    config: of the run.
    folder: its workdir, maybe in a bucket.
    path: the local folder of its outputs, which has the files FETCH.

  Raises:
    ValueError: Weights & Biases cannot be used.
  """

  def __init__(self, config: ConfigDict, folder: epath.Path, path: Path):
    self._outputs: list[Output] = []
    if not processes.is_process_0():
      return
    with contextlib.ExitStack() as stack:  # closes the others if one cannot be opened
      self._file = stack.enter_context(contextlib.closing(json_lines.JsonLines(path / METRICS)))
      self._outputs.append(RunReport(path / "report.html", path / METRICS, folder, config))
      if config.train.tensorboard:
        try:
          self._outputs.append(stack.enter_context(contextlib.closing(_TensorBoard(path / "tensorboard"))))
        except ImportError as e:
          progress.write(f"no TensorBoard files ({e}): pip install 'flextok-jax[tensorboard]', or watch report.html")
      if config.train.wandb:
        self._outputs.append(stack.enter_context(contextlib.closing(_Wandb(config, run_name(folder), path))))
      self._stack = stack.pop_all()

  def write(self, step: int, scalars: Mapping[str, float], line: str, pictures: Sequence[Path] = ()) -> None:
    """Writes the scalars of a step and pictures to the files and `line` to the console; OSError if the disk is full."""
    if not self._outputs:
      return
    self._file.write({"step": step, **scalars})
    for output in self._outputs:
      output.write(step, scalars, pictures)
    progress.write(line)

  def close(self) -> None:
    if self._outputs:
      self._stack.close()
      self._outputs[0].close()  # the report is last, as it says that the run has ended


class _TensorBoard:
  """Files of TensorBoard (by clu); ImportError if tensorflow is not installed."""

  def __init__(self, folder: Path):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # jax has set it to 1, at which a full disk prints several lines
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # otherwise it logs that it uses oneDNN
    from clu import metric_writers
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # jax owns them
    self._writer = metric_writers.SummaryWriter(str(folder))

  def write(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Path]) -> None:
    try:
      self._writer.write_scalars(step, dict(scalars))
      images = {f"eval/{path.stem}": np.asarray(Image.open(path).convert("RGB")) for path in pictures}
      self._writer.write_images(step, images)
      self._writer.flush()
    except Exception as e:  # tensorflow has its own types
      raise OSError(f"cannot write the files of TensorBoard: {first_line(e, 200)}") from e

  def close(self) -> None:
    self._writer.close()


class _Wandb:
  """A run of Weights & Biases, whose id the workdir keeps: a resumed run goes on with it.

  Their own environment variables have their usual effect, such as WANDB_MODE=offline and WANDB_ENTITY.
  """

  def __init__(self, config: ConfigDict, name: str, path: Path):
    project = config.train.wandb
    self._wandb: Any = extras.require("wandb", "wandb", f"train.wandb={project}")
    known = path / WANDB_ID
    if not known.exists():
      files.write_file(known, secrets.token_hex(4).encode())
    run_id = files.read_text(known, 100).strip()
    folder = os.environ.get("WANDB_DIR", str(path))
    options = dict(config=flatten(config), allow_val_change=True, dir=folder)
    try:
      self._run = self._wandb.init(project=project, id=run_id, resume="allow", name=name, **options)
      self._run.define_metric("*", step_metric="step")  # its own count must not repeat steps, as a resumed run may
    except Exception as e:  # of its own types
      raise ValueError(
        f"train.wandb={project} cannot be used ({first_line(e, 200)}): run wandb login, set WANDB_MODE=offline, or "
        'leave train.wandb=""'
      ) from e

  def write(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Path]) -> None:
    images = {f"eval/{path.stem}": self._wandb.Image(str(path)) for path in pictures}
    self._run.log({"step": step, **scalars, **images})

  def close(self) -> None:
    self._run.finish(exit_code=int(sys.exc_info()[0] is not None))
