"""Means and covariances of features, and the Fréchet distance between them (FID, sFID, FDD), in float64 on the host.

Features are [n, d] of any real type: an Inception's pool (d = 2048) or spatial features (2023), or a DINOv2's. Moments
takes them as they come, a batch at a time. In a run of several processes the devices give each batch replicated, and
every process adds all of it: they hold the same then.

Covariances are not summed on the devices. Those of fewer samples than features are singular, and the distance takes the
square roots of eigenvalues: with 1024 samples of 2048 random features against 4096, products in float32 (which left
errors of 1e-6 in the covariance) moved a distance of 396 by 0.2, those in float64 by 2e-5, and took no longer on a CPU.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.stats

_ROWS = 4096  # rows in float64 at once: 64 MiB of 2048 features


class Moments:
  """Count, mean and scatter matrix of features that arrive in parts, in any order, in float64.

  Parts join by the pairwise update of Chan, Golub and LeVeque (1979, equations 2.1): sums are taken about the mean of
  each part, so nothing cancels, however far the mean is from zero. State goes through to_arrays and from_arrays.

  Attributes:
    count: rows seen.
    mean: [d]; zeros before the first row.
    scatter: [d, d], the sum of (x - mean)(x - mean)^T.
  """

  def __init__(self, dim: int):
    self.count = 0
    self.mean = np.zeros(dim)
    self.scatter = np.zeros((dim, dim))

  def add(self, features: np.ndarray, valid: np.ndarray | None = None):
    """Adds rows [n, d]; those where valid [n] is False are padding and left out, whatever they hold.

    Raises:
      ValueError: features of another shape, or a value that is not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] != len(self.mean):
      raise ValueError(f"features have shape {list(features.shape)}, not [n, {len(self.mean)}]")
    if valid is not None:
      features = features[np.asarray(valid, bool)]
    for start in range(0, len(features), _ROWS):
      rows = features[start : start + _ROWS].astype(np.float64)
      mean = rows.mean(0)
      if not np.isfinite(mean).all():
        raise ValueError("features are not finite: the network or its images are broken")
      rows -= mean
      self._join(len(rows), mean, rows)

  def merge(self, other: "Moments"):
    """Adds all that another one has seen.

    Raises:
      ValueError: it is of another dimension.
    """
    if len(other.mean) != len(self.mean):
      raise ValueError(f"moments of {len(other.mean)} features cannot join those of {len(self.mean)}")
    if other.count:
      self._join(other.count, other.mean, np.empty((0, len(self.mean))))
      self.scatter += other.scatter

  def covariance(self) -> np.ndarray:
    """Returns the unbiased covariance [d, d], as np.cov(features, rowvar=False).

    Raises:
      ValueError: fewer than two rows.
    """
    if self.count < 2:
      raise ValueError(f"a covariance needs 2 samples or more, got {self.count}")
    return self.scatter / (self.count - 1)

  def to_arrays(self) -> dict[str, np.ndarray]:
    """Returns the state, to be kept in a file or sent to other processes, in float64 (int64 count)."""
    return {"count": np.int64(self.count), "mean": self.mean, "scatter": self.scatter}

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
    """Returns moments of a state that to_arrays gave, apart from its arrays."""
    moments = cls(len(arrays["mean"]))
    moments.count = int(arrays["count"])
    moments.mean = np.array(arrays["mean"], np.float64)
    moments.scatter = np.array(arrays["scatter"], np.float64)
    return moments

  def _join(self, count: int, mean: np.ndarray, centred: np.ndarray):
    """Joins a part by its count, its mean and its rows less this mean; the rows may be left to the caller."""
    total = self.count + count
    shift = mean - self.mean
    # The distance between the means weighs as one row more.
    rows = np.concatenate([centred, np.sqrt(self.count / total * count) * shift[None]])
    self.scatter += rows.T @ rows  # BLAS knows that this is symmetric, and does half of it
    self.mean = self.mean + count / total * shift
    self.count = total


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
  """Returns the squared Fréchet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians (FID).

  Dowson and Landau 1982, Heusel et al. 2017 (equation 6). The trace of (S1 S2)^(1/2) is the sum of the
  square roots of the eigenvalues of B^T S2 B, where S1 = B B^T: a symmetric problem, whose rounding makes no complex
  numbers; negative eigenvalues, which are rounding alone, count as 0. Singular covariances need no offset.

  Args:
    mu1, mu2: means [d].
    sigma1, sigma2: covariances [d, d].

  Raises:
    ValueError: shapes that do not fit, or what checked_gaussian refuses.
  """
  mu1, sigma1 = checked_gaussian(mu1, sigma1)
  mu2, sigma2 = checked_gaussian(mu2, sigma2)
  if len(mu1) != len(mu2):
    raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features are of different networks or layers")
  return _distance(mu1, sigma1, _factor(sigma1), mu2, sigma2)


class Extrapolation(NamedTuple):
  """A distance at infinitely many samples (value), from those at counts [num_points] (distances [num_points])."""

  value: float
  counts: np.ndarray
  distances: np.ndarray


def fid_infinity(
  features: np.ndarray, mu: np.ndarray, sigma: np.ndarray, num_points: int = 15, smallest: int = 5000, seed: int = 0
) -> Extrapolation:
  """Extrapolates the Fréchet distance of n samples to infinitely many, where its bias vanishes (FID-infinity).

  Chong and Forsyth 2020, as in their score_infinity.py: the bias is linear in 1/n, so a line through distances over 1/n
  at num_points counts, from `smallest` to all, is read off at 0. Each count has samples of its own, drawn at random
  without replacement. The bias that comes with a reference of few samples remains.

  Args:
    features: [n, d] of the samples.
    mu, sigma: mean [d] and covariance [d, d] of the reference.
    smallest: the least count; no fewer than twice d are sensible.

  Raises:
    ValueError: not smallest < n, fewer than two points, or what Moments and frechet_distance refuse.
  """
  mu, sigma = checked_gaussian(mu, sigma)
  if not 2 <= smallest < len(features) or num_points < 2:
    raise ValueError(
      f"no line through {num_points} points from {smallest} samples to {len(features)}: FID-infinity "
      "needs 2 points or more, and more samples than `smallest`"
    )
  counts = np.linspace(smallest, len(features), num_points).astype(int)
  rng = np.random.default_rng(seed)
  factor = _factor(sigma)
  distances = []
  for count in counts:
    moments = Moments(len(mu))
    chosen = np.sort(rng.choice(len(features), count, replace=False))
    for start in range(0, count, _ROWS):
      moments.add(features[chosen[start : start + _ROWS]])
    distances.append(_distance(mu, sigma, factor, moments.mean, moments.covariance()))
  return Extrapolation(float(scipy.stats.linregress(1 / counts, distances).intercept), counts, np.array(distances))


def checked_gaussian(mu: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns mu [d] and sigma [d, d] in float64.

  Raises:
    ValueError: other shapes, a value that is not finite, or a sigma that is not symmetric.
  """
  mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
  if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
    raise ValueError(f"a mean of shape {list(mu.shape)} and a covariance of {list(sigma.shape)} are not [d] and [d, d]")
  if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
    raise ValueError("a mean or covariance is not finite: compute these statistics again")
  if np.abs(sigma - sigma.T).max(initial=0) > 1e-5 * np.abs(sigma).max(initial=0):  # float32's rounding may be there
    raise ValueError("a covariance is not symmetric: compute these statistics again")
  return mu, sigma


def _factor(sigma: np.ndarray) -> np.ndarray:
  """Returns B [d, d], where B B^T = sigma."""
  values, vectors = np.linalg.eigh(sigma)
  return vectors * np.sqrt(np.maximum(values, 0))


def _distance(mu1: np.ndarray, sigma1: np.ndarray, factor1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
  product = np.linalg.eigvalsh(factor1.T @ sigma2 @ factor1)
  overlap = np.sqrt(np.maximum(product, 0)).sum()
  # The distance of equal Gaussians is rounding, of either sign.
  return max(0.0, float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap))
