"""Accumulates metrics, moments of features and example images of a set, batch by batch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flextok_jax.core import images as images_lib
from flextok_jax.evals.metrics import frechet
from flextok_jax.evals.metrics import samples as sample_metrics

ORIGINAL = "original"  # column of the images that are reconstructed


class Accumulator:
  """Accumulates the results of batches, in the order of the images, for each column of a report.

  Args:
    num_examples: images kept per column.
    arrays: result of to_arrays, to resume from.
  """

  def __init__(self, num_examples: int, arrays: Mapping[str, np.ndarray] | None = None):
    self._num_examples = num_examples
    self._values: dict[str, dict[str, list[np.ndarray]]] = {}  # by column and name
    self._examples: dict[str, list[np.ndarray]] = {}
    moments: dict[str, dict[str, dict]] = {}
    for name, array in (arrays or {}).items():
      kind, column, field = name.split("/", 2)
      if kind == "values":
        self._values.setdefault(column, {})[field] = [array]
      elif kind == "examples":
        self._examples[column] = [array]
      else:
        layer, field = field.split("/")
        moments.setdefault(column, {}).setdefault(layer, {})[field] = array
    self._moments = {
      column: {layer: frechet.Moments.from_arrays(fields) for layer, fields in layers.items()}
      for column, layers in moments.items()
    }

  def add(
    self, column: str, images: np.ndarray | None, scores: Mapping[str, np.ndarray], features: Mapping[str, np.ndarray]
  ):
    """Adds a batch.

    Args:
      images: uint8 [b, h, w, 3], or None.
      scores: {name: [b, ...]}, all kept.
      features: {layer: [b, d]}, whose moments are kept.
    """
    for name, array in scores.items():
      self._values.setdefault(column, {}).setdefault(name, []).append(array)
    for layer, array in features.items():
      layers = self._moments.setdefault(column, {})
      if layer not in layers:
        layers[layer] = frechet.Moments(array.shape[1])
      layers[layer].add(array)
    if images is not None:
      kept = self._examples.setdefault(column, [])
      missing = self._num_examples - sum(map(len, kept))
      if missing > 0:
        kept.append(images[:missing])

  @property
  def columns(self) -> list[str]:
    """The columns, without that of the originals."""
    return [column for column in dict.fromkeys((*self._values, *self._moments)) if column != ORIGINAL]

  def values(self, column: str) -> dict[str, np.ndarray]:
    """Returns {name: [n, ...]}."""
    return {name: np.concatenate(parts) for name, parts in self._values.get(column, {}).items()}

  def gaussian(self, column: str, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean [d] and the covariance [d, d] of the features of a layer."""
    moments = self._moments[column][layer]
    return moments.mean, moments.covariance()

  def examples(self) -> dict[str, np.ndarray]:
    """Returns the first images, uint8 [n, h, w, 3], by column, padded to one size."""
    return {column: images_lib.pad_together(parts) for column, parts in self._examples.items()}

  def to_arrays(self) -> dict[str, Any]:
    """Returns the state as arrays by name."""
    arrays = {f"examples/{column}/first": array for column, array in self.examples().items()}
    for column in self._values:
      arrays |= {f"values/{column}/{name}": array for name, array in self.values(column).items()}
    for column, layers in self._moments.items():
      for layer, moments in layers.items():
        arrays |= {f"moments/{column}/{layer}/{field}": array for field, array in moments.to_arrays().items()}
    return arrays


def means_and_intervals(scores: Mapping[str, np.ndarray]) -> tuple[dict[str, float], dict[str, list[float]]]:
  """Returns the means of {metric: [n]}, and their 95% intervals by bootstrap if n > 1."""
  scores = {metric: x.astype(np.float64) for metric, x in scores.items()}
  several = {metric: x for metric, x in scores.items() if len(x) > 1 and np.isfinite(x).all()}
  return (
    {metric: float(x.mean()) for metric, x in scores.items()},
    {metric: list(sample_metrics.bootstrap_interval(x)) for metric, x in several.items()},
  )
