"""Metrics of the training loop, accumulated over steps."""

from collections.abc import Mapping

from clu import metrics as clu_metrics
import flax
import jax
import jax.numpy as jnp

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
