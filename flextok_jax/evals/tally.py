"""What the images of a set have given so far, column by column: values, features' moments and the first pictures."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flextok_jax.evals import statistics

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
    self._moments: dict[str, statistics.Moments] = {}
    moments: dict[str, dict] = {}
    for name, array in (arrays or {}).items():
      kind, column, field = name.split("/")
      if kind == "values":
        self._values.setdefault(column, {})[field] = [array]
      elif kind == "pictures":
        self._pictures[column] = [array]
      else:
        moments.setdefault(column, {})[field] = array
    self._moments = {column: statistics.Moments.from_arrays(fields) for column, fields in moments.items()}

  def add(self, column: str, count: int, pictures, values: Mapping[str, np.ndarray], features: np.ndarray | None):
    """Adds a batch, of which the first `count` rows are images and the others padding.

    Args:
      pictures: uint8 [b, h, w, 3], or None.
      values: {metric: [b]}.
      features: [b, d], or None.
    """
    for metric, array in values.items():
      self._values.setdefault(column, {}).setdefault(metric, []).append(np.asarray(array)[:count])
    if features is not None:
      if column not in self._moments:
        self._moments[column] = statistics.Moments(features.shape[1])
      self._moments[column].add(np.asarray(features)[:count])
    if pictures is not None:
      kept = self._pictures.setdefault(column, [])
      missing = self._num_pictures - sum(map(len, kept))
      if missing > 0:
        kept.append(np.asarray(pictures)[: min(count, missing)])

  def scores(self) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
    """Returns ({column: {metric: mean, "rfid": ...}}, {column: {metric: [low, high]}}), 95% intervals of the means."""
    means: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, list[float]]] = {}
    for column, parts in self._values.items():
      joined = {metric: np.concatenate(arrays).astype(np.float64) for metric, arrays in parts.items()}
      means[column] = {metric: float(values.mean()) for metric, values in joined.items()}
      intervals[column] = {
          metric: [float(x) for x in statistics.bootstrap_interval(values)] for metric, values in joined.items()
      }
    for column, moments in self._moments.items():
      if column != ORIGINAL:
        means.setdefault(column, {})["rfid"] = statistics.frechet_distance(
            *_gaussian(moments), *_gaussian(self._moments[ORIGINAL]))
    return means, intervals

  def pictures(self) -> dict[str, np.ndarray]:
    """Returns the first pictures, uint8 [n, h, w, 3], by column."""
    return {column: np.concatenate(parts) for column, parts in self._pictures.items()}

  def moments(self, column: str) -> statistics.Moments:
    return self._moments[column]

  def to_arrays(self) -> dict[str, Any]:
    """Returns everything as arrays by name."""
    arrays = {
        f"values/{column}/{metric}": np.concatenate(parts)
        for column, metrics in self._values.items() for metric, parts in metrics.items()
    }
    arrays |= {f"pictures/{column}/first": array for column, array in self.pictures().items()}
    for column, moments in self._moments.items():
      arrays |= {f"moments/{column}/{field}": array for field, array in moments.to_arrays().items()}
    return arrays


def _gaussian(moments: statistics.Moments) -> tuple[np.ndarray, np.ndarray]:
  return moments.mean, moments.covariance()
