"""Metrics of the training loop: accumulation over steps, and writing."""

from collections.abc import Mapping
import os
from pathlib import Path

from clu import metrics as clu_metrics
import flax
import jax
import jax.numpy as jnp

from flextok_jax.core import json_lines
from flextok_jax.core.errors import first_line
from flextok_jax.parallel import processes

NEVER = jnp.iinfo(jnp.int32).max  # FirstBadStep while every loss was finite


@flax.struct.dataclass
class Total(clu_metrics.Metric):
  """A sum over steps."""

  total: jax.Array

  def merge(self, other: "Total") -> "Total":
    return Total(self.total + other.total)

  def compute(self) -> jax.Array:
    return self.total


@flax.struct.dataclass
class FirstBadStep(clu_metrics.Metric):
  """The first step whose loss or gradient was not finite, else NEVER; it costs no synchronisation until it is read."""

  step: jax.Array

  def merge(self, other: "FirstBadStep") -> "FirstBadStep":
    return FirstBadStep(jnp.minimum(self.step, other.step))

  def compute(self) -> jax.Array:
    return self.step


def from_update(pairs: Mapping[str, tuple], unreadable: jax.Array, finite: jax.Array, step: jax.Array) -> dict:
  """Returns the metrics of a step.

  Args:
    pairs: (sum, count) by name, of means.
    unreadable: number of unreadable files in the batch.
    finite: whether loss and gradient are finite.
    step: number of the step.
  """
  out = {k: clu_metrics.Average(jnp.float32(total), jnp.float32(count)) for k, (total, count) in pairs.items()}
  return out | {"unreadable": Total(unreadable), "first_bad_step": FirstBadStep(jnp.where(finite, NEVER, step))}


@jax.jit
def merge(a: dict, b: dict) -> dict:
  """Merges the metrics of two ranges of steps."""
  return {k: a[k].merge(b[k]) for k in a}


def compute(metrics: dict) -> dict[str, float]:
  """Fetches metrics from the devices; means over no samples are left out."""
  metrics = jax.device_get(metrics)
  defined = {k: m for k, m in metrics.items() if not isinstance(m, clu_metrics.Average) or m.count > 0}
  return {k: float(m.compute()) for k, m in defined.items()}


class Writer:
  """Writes scalars to the console, to metrics.jsonl and, if tensorflow is installed, to TensorBoard (by clu).

  On processes other than 0 it writes nothing.

  Args:
    path: of metrics.jsonl.
    tensorboard: folder of the files of TensorBoard; None: there are none.
  """

  def __init__(self, path: Path, tensorboard: Path | None = None):
    self._file = self._summary = None
    if not processes.is_process_0():
      return
    self._file = json_lines.JsonLines(path)
    if tensorboard:
      try:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # jax has set it to 1, at which a full disk prints several lines
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # otherwise it logs that it uses oneDNN
        from clu import metric_writers
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # jax owns them
        self._summary = metric_writers.SummaryWriter(str(tensorboard))
      except ImportError as e:
        print(f"no TensorBoard files ({e}): metrics go to the console and metrics.jsonl", flush=True)

  def write(self, step: int, scalars: Mapping[str, float], line: str) -> None:
    """Writes the scalars of a step to the files and `line` to the console; OSError if the disk is full."""
    if self._file is None:
      return
    self._file.write({"step": step, **scalars})
    if self._summary is not None:
      try:
        self._summary.write_scalars(step, dict(scalars))
        self._summary.flush()
      except Exception as e:  # tensorflow has its own types
        raise OSError(f"cannot write the files of TensorBoard: {first_line(e, 200)}") from e
    print(line, flush=True)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    if self._summary is not None:
      self._summary.close()
