"""Metrics of the train loop: what the update returns, and where it is written."""

from collections.abc import Mapping
import json
import os

from clu import metrics as clu_metrics
import flax
import jax
import jax.numpy as jnp

NEVER = jnp.iinfo(jnp.int32).max  # FirstBadStep while every loss was finite


@flax.struct.dataclass
class Total(clu_metrics.Metric):
  """A count that adds up."""

  total: jax.Array

  def merge(self, other):
    return Total(self.total + other.total)

  def compute(self):
    return self.total


@flax.struct.dataclass
class FirstBadStep(clu_metrics.Metric):
  """The first step with a loss or gradient that is not finite, else NEVER; costs no synchronisation until read."""

  step: jax.Array

  def merge(self, other):
    return FirstBadStep(jnp.minimum(self.step, other.step))

  def compute(self):
    return self.step


def from_update(pairs: Mapping[str, tuple], unreadable: jax.Array, finite: jax.Array, step: jax.Array) -> dict:
  """Wraps the (sum, count) pairs of a step as clu metrics, with the unreadable files and the finiteness of the step."""
  out = {k: clu_metrics.Average(jnp.float32(total), jnp.float32(count)) for k, (total, count) in pairs.items()}
  return out | {"unreadable": Total(unreadable), "first_bad_step": FirstBadStep(jnp.where(finite, NEVER, step))}


@jax.jit
def merge(a: dict, b: dict) -> dict:
  """Merges the metrics of two stretches of steps."""
  return {k: a[k].merge(b[k]) for k in a}


def compute(metrics: dict) -> dict[str, float]:
  """Fetches metrics; a mean over no sample is left out."""
  metrics = jax.device_get(metrics)
  seen = {k: m for k, m in metrics.items() if not isinstance(m, clu_metrics.Average) or m.count > 0}
  return {k: float(m.compute()) for k, m in seen.items()}


class Writer:
  """Scalars to the console, to metrics.jsonl and, where tensorflow is installed, to TensorBoard (by clu)."""

  def __init__(self, workdir: str, tensorboard: bool):
    self._file = open(os.path.join(workdir, "metrics.jsonl"), "a", buffering=1)  # noqa: SIM115 closed in close()
    self._summary = None
    if tensorboard:
      try:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # says so otherwise, at length
        from clu import metric_writers
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # jax owns them
        self._summary = metric_writers.SummaryWriter(os.path.join(workdir, "tensorboard"))
      except ImportError as e:
        print(f"no TensorBoard files ({e}): metrics go to the console and metrics.jsonl", flush=True)

  def write(self, step: int, scalars: Mapping[str, float], line: str):
    """Writes the scalars of a step; `line` is what the console shows."""
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    if self._summary is not None:
      self._summary.write_scalars(step, dict(scalars))
      self._summary.flush()
    print(line, flush=True)

  def close(self):
    self._file.close()
    if self._summary is not None:
      self._summary.close()
