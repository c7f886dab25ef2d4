"""What the images of a set have given so far, column by column: values, moments of features and the first pictures."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flextok_jax.evals.metrics import frechet as statistics
from flextok_jax.evals.metrics import samples as sample_metrics

ORIGINAL = "original"  # the column of the images themselves


class Tally:
  """Collects the results of batches, in the order of the images.

  Args:
    num_pictures: pictures kept a column.
    arrays: of to_arrays, to go on with.
  """

  def __init__(self, num_pictures: int, arrays: Mapping[str, np.ndarray] | None = None):
    self._num_pictures = num_pictures
    self._values: dict[str, dict[str, list[np.ndarray]]] = {}  # column: metric: parts
    self._pictures: dict[str, list[np.ndarray]] = {}
    moments: dict[str, dict[str, dict]] = {}
    for name, array in (arrays or {}).items():
      kind, column, field = name.split("/", 2)
      if kind == "values":
        self._values.setdefault(column, {})[field] = [array]
      elif kind == "pictures":
        self._pictures[column] = [array]
      else:
        layer, field = field.split("/")
        moments.setdefault(column, {}).setdefault(layer, {})[field] = array
    self._moments = {
      column: {layer: statistics.Moments.from_arrays(fields) for layer, fields in layers.items()}
      for column, layers in moments.items()
    }

  def add(
    self,
    column: str,
    count: int,
    pictures: np.ndarray | None,
    values: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
  ):
    """Adds a batch, of which the first `count` rows are images and the others padding.

    Args:
      pictures: uint8 [b, h, w, 3], or None.
      values: {name: [b, ...]}, kept as they are.
      features: {layer: [b, d]}, of which the moments are kept.
    """
    for name, array in values.items():
      self._values.setdefault(column, {}).setdefault(name, []).append(np.asarray(array)[:count])
    for layer, array in features.items():
      layers = self._moments.setdefault(column, {})
      if layer not in layers:
        layers[layer] = statistics.Moments(array.shape[1])
      layers[layer].add(np.asarray(array)[:count])
    if pictures is not None:
      kept = self._pictures.setdefault(column, [])
      missing = self._num_pictures - sum(map(len, kept))
      if missing > 0:
        kept.append(np.asarray(pictures)[: min(count, missing)])

  @property
  def columns(self) -> list[str]:
    """The columns of images that were made."""
    return [column for column in dict.fromkeys((*self._values, *self._moments)) if column != ORIGINAL]

  def values(self, column: str) -> dict[str, np.ndarray]:
    """Returns {name: [n, ...]}."""
    return {name: np.concatenate(parts) for name, parts in self._values.get(column, {}).items()}

  def gaussian(self, column: str, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean [d] and covariance [d, d] of a layer's features."""
    moments = self._moments[column][layer]
    return moments.mean, moments.covariance()

  def pictures(self) -> dict[str, np.ndarray]:
    """Returns the first pictures, uint8 [n, h, w, 3], by column."""
    return {column: np.concatenate(parts) for column, parts in self._pictures.items()}

  def to_arrays(self) -> dict[str, Any]:
    """Returns everything as arrays by name."""
    arrays = {f"pictures/{column}/first": array for column, array in self.pictures().items()}
    for column in self._values:
      arrays |= {f"values/{column}/{name}": array for name, array in self.values(column).items()}
    for column, layers in self._moments.items():
      for layer, moments in layers.items():
        arrays |= {f"moments/{column}/{layer}/{field}": array for field, array in moments.to_arrays().items()}
    return arrays


def means_and_intervals(values: Mapping[str, np.ndarray]) -> tuple[dict[str, float], dict[str, list[float]]]:
  """Returns the means of {metric: [n]}, and the 95% intervals of these means by bootstrap, where n is above 1."""
  values = {metric: x.astype(np.float64) for metric, x in values.items()}
  several = {metric: x for metric, x in values.items() if len(x) > 1 and np.isfinite(x).all()}
  return (
    {metric: float(x.mean()) for metric, x in values.items()},
    {metric: list(sample_metrics.bootstrap_interval(x)) for metric, x in several.items()},
  )
