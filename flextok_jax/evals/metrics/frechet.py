"""Means and covariances of features, the Fréchet distance between them (FID, sFID, FDD), and their files.

Features are [n, d] of any real type: an Inception's pool (d = 2048) or spatial features (2023), or a DINOv2's. Moments
accumulates them batch by batch, in float64 on the host. In a run of several processes the devices return every batch
replicated and every process adds all of it, so all hold the same moments.

Covariances are not summed on the devices. Those of fewer samples than features are singular, and the distance takes the
square roots of eigenvalues: with 1024 samples of 2048 random features against 4096, products in float32 (errors of 1e-6
in the covariance) changed a distance of 396 by 0.2, products in float64 by less than 1e-4, in the same time on a CPU.

Statistics and images are exchanged in .npz files, in which nothing is unpickled:

- pytorch-fid: mu [d] and sigma [d, d], the mean and covariance of Inception's pool features.
- ADM (guided-diffusion's evaluations, the VIRTUAL_*.npz of its reference batches): the same, mu_s and sigma_s of its
  spatial features (for sFID), and the images themselves as arr_0. Sample batches have arr_0 alone.
- Ours: mu, sigma, mu_s and sigma_s, and num_images, the number of images that they are from.
"""

from collections.abc import Iterator, Mapping
import io
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg.lapack
import scipy.stats

from flextok_jax.core import files, npz

PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))
_ROWS = 4096  # rows in float64 at once: 64 MiB of 2048 features
_IMAGES, _COUNT = "arr_0", "num_images"


class Moments:
  """Accumulates count, mean and scatter matrix of features that arrive in parts, in any order, in float64.

  Parts are merged by the pairwise update of Chan, Golub and LeVeque (1979, equations 2.1): sums are taken about the
  mean of each part, so there is no cancellation, however far the mean is from zero. to_arrays and from_arrays save and
  restore the state.

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
    """Adds rows [n, d]; rows where valid [n] is False are padding and ignored.

    Raises:
      ValueError: features of a wrong shape, or not finite.
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
    """Adds the rows of other moments.

    Raises:
      ValueError: they have another dimension.
    """
    if len(other.mean) != len(self.mean):
      raise ValueError(f"moments of {len(other.mean)} features cannot be merged with those of {len(self.mean)}")
    if other.count:
      self._join(other.count, other.mean, np.empty((0, len(self.mean))))
      self.scatter += other.scatter

  def covariance(self) -> np.ndarray:
    """Returns the unbiased covariance [d, d], equal to np.cov(features, rowvar=False).

    Raises:
      ValueError: fewer than 2 rows.
    """
    if self.count < 2:
      raise ValueError(f"a covariance needs 2 samples or more, got {self.count}")
    return self.scatter / (self.count - 1)

  def to_arrays(self) -> dict[str, Any]:
    """Returns the state, in float64 (count: int64), to save it or send it to other processes."""
    return {"count": np.int64(self.count), "mean": self.mean, "scatter": self.scatter}

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
    """Restores moments from the result of to_arrays, whose arrays are copied."""
    moments = cls(len(arrays["mean"]))
    moments.count = int(arrays["count"])
    moments.mean = np.array(arrays["mean"], np.float64)
    moments.scatter = np.array(arrays["scatter"], np.float64)
    return moments

  def _join(self, count: int, mean: np.ndarray, centred: np.ndarray):
    """Merges a part of a mean and rows less this mean; the caller may add the rows' scatter itself and pass none."""
    total = self.count + count
    shift = mean - self.mean
    # The difference of the means counts as one more row.
    rows = np.concatenate([centred, np.sqrt(self.count / total * count) * shift[None]])
    self.scatter += rows.T @ rows  # BLAS computes half of it, as it is symmetric
    self.mean = self.mean + count / total * shift
    self.count = total


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
  """Returns the squared Fréchet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians (FID).

  Dowson and Landau 1982, Heusel et al. 2017 (equation 6). The trace of (S1 S2)^(1/2) is the sum of the square roots of
  the eigenvalues of B^T S2 B, where S1 = B B^T. This problem is symmetric, so rounding cannot make its eigenvalues
  complex; negative ones are due to rounding and count as 0. Singular covariances need no offset.

  Args:
    mu1, mu2: means [d].
    sigma1, sigma2: covariances [d, d].

  Raises:
    ValueError: shapes that do not match, or bad values as in checked_gaussian.
  """
  mu1, sigma1 = checked_gaussian(mu1, sigma1)
  mu2, sigma2 = checked_gaussian(mu2, sigma2)
  if len(mu1) != len(mu2):
    raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features come from different networks or layers")
  return _distance(mu1, sigma1, _factor(sigma1), mu2, sigma2)


def caution(metric: str, sizes: Mapping[str, int | None], dim: int) -> str:
  """Returns a sentence if a distance is between sets of fewer images than features, which is biased; else "".

  Args:
    metric: its name.
    sizes: {name of a set: number of images, or None if unknown}.
    dim: features.
  """
  few = [f"{count} {name}" for name, count in sizes.items() if count is not None and count <= dim]
  if not few:
    return ""
  return (
    f"Caution: {metric} of {' and '.join(few)} with {dim} features: their covariance is singular and the distance too "
    "large; compare it only with distances of as many images (50000 are usual)."
  )


class Extrapolation(NamedTuple):
  """A distance extrapolated to infinitely many samples, from distances [num_points] at counts [num_points]."""

  value: float
  counts: np.ndarray
  distances: np.ndarray


def fid_infinity(
  features: np.ndarray, mu: np.ndarray, sigma: np.ndarray, num_points: int = 15, smallest: int = 5000, seed: int = 0
) -> Extrapolation:
  """Extrapolates the Fréchet distance of n samples to infinitely many, where its bias vanishes (FID-infinity).

  Chong and Forsyth 2020, as in their score_infinity.py: the bias is linear in 1/n, so a line is fitted to the distances
  over 1/n at num_points counts, from `smallest` to all samples, and evaluated at 0. For each count, samples are drawn
  at random without replacement. The bias due to a small reference set remains.

  Args:
    features: [n, d] of the samples.
    mu, sigma: mean [d] and covariance [d, d] of the reference.
    smallest: the smallest count; it should be at least twice d.

  Raises:
    ValueError: not 2 <= smallest < n, fewer than 2 points, or bad values as in Moments and frechet_distance.
  """
  mu, sigma = checked_gaussian(mu, sigma)
  if not 2 <= smallest < len(features) or num_points < 2:
    raise ValueError(
      f"cannot fit num_points={num_points} points from smallest={smallest} to {len(features)} samples: FID-infinity "
      "needs at least 2 points, and more samples than `smallest`"
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
    ValueError: wrong shapes, a value that is not finite, or a sigma that is not symmetric.
  """
  mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
  if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
    raise ValueError(f"a mean of shape {list(mu.shape)} and a covariance of {list(sigma.shape)} are not [d] and [d, d]")
  if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
    raise ValueError("a mean or covariance is not finite: compute these statistics again")
  if np.abs(sigma - sigma.T).max(initial=0) > 1e-5 * np.abs(sigma).max(initial=0):  # allows float32's rounding
    raise ValueError("a covariance is not symmetric: compute these statistics again")
  return mu, sigma


def _factor(sigma: np.ndarray) -> np.ndarray:
  """Returns B [d, r] such that B B^T = sigma, of rank r: its Cholesky factor with pivoting."""
  factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
  rows = np.empty((len(sigma), rank))
  rows[pivots - 1] = np.tril(factor)[:, :rank]
  return rows


def _distance(mu1: np.ndarray, sigma1: np.ndarray, factor1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
  product = np.linalg.eigvalsh(factor1.T @ sigma2 @ factor1)
  overlap = np.sqrt(np.maximum(product, 0)).sum()
  # For equal Gaussians the distance is a rounding error of either sign.
  return max(0.0, float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap))


# Files.


def array_names(path: str | os.PathLike) -> set[str]:
  """Returns the names of the arrays in a .npz file.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a complete .npz file.
  """
  with npz.opened(path) as archive:
    return set(npz.names(archive))


def load_statistics(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads "mu" [d] and "sigma" [d, d], and "mu_s" and "sigma_s" if present, as float64.

  Images in the same file are not read.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a complete .npz file, no statistics, or bad values as in checked_gaussian.
  """
  with npz.opened(path) as archive:
    names = {name for pair in PAIRS for name in pair if name in npz.names(archive)}
    arrays = {name: npz.read(archive, name, "f") for name in names}
  if not {"mu", "sigma"} <= names:
    raise ValueError(f"{path} has no arrays mu and sigma: it holds no statistics; compute them from its images")
  return _checked(path, arrays)


def count_images(path: str | os.PathLike) -> int | None:
  """Returns the number of images that a .npz file holds or was computed from; None if it does not say."""
  with npz.opened(path) as archive:
    if _COUNT in npz.names(archive):
      return int(npz.read(archive, _COUNT, "iu"))
    held = _IMAGES in npz.names(archive)
  return SampleFile(path).shape[0] if held else None


def save_statistics(path: str | os.PathLike, statistics: Mapping[str, np.ndarray], num_images: int | None = None):
  """Writes "mu" and "sigma", and "mu_s" and "sigma_s" if given, as float64, and "num_images", atomically.

  Raises:
    ValueError: other names, bad values as in checked_gaussian, or a path that cannot be written.
  """
  if set(statistics) not in ({"mu", "sigma"}, {"mu", "sigma", "mu_s", "sigma_s"}):
    raise ValueError(
      f"statistics are named {', '.join(statistics)}: they must be mu and sigma, with or without mu_s and sigma_s"
    )
  if not os.fspath(path).endswith(".npz"):
    raise ValueError(f"cannot write statistics to {path}: the name must end in .npz")
  buffer = io.BytesIO()
  arrays = _checked(path, statistics)
  if num_images is not None:
    arrays[_COUNT] = np.int64(num_images)
  np.savez(buffer, **arrays)
  files.write_file(Path(path), buffer.getvalue())


class SampleFile:
  """Images of a .npz file, arr_0 of uint8, read batch by batch: 50,000 images of 256 px take 10 GB.

  Attributes:
    shape: (n, h, w, 3).

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a complete .npz file, or no uint8 images arr_0 [n, h, w, 3].
  """

  def __init__(self, path: str | os.PathLike):
    self._path = path
    with npz.opened(path) as archive:
      found = _IMAGES in npz.names(archive)
      if found:
        with npz.open_array(archive, _IMAGES) as stream:
          self.shape, fortran, dtype = npz.header(archive, _IMAGES, stream)
    if not found:
      raise ValueError(f"{path} has no array {_IMAGES}: it holds no images")
    if dtype != np.uint8 or fortran or len(self.shape) != 4 or self.shape[3] != 3 or not all(self.shape):
      raise ValueError(f"{path}: {_IMAGES} is {dtype} {list(self.shape)}, not images of uint8 [n, h, w, 3]")

  def batches(self, batch_size: int) -> Iterator[np.ndarray]:
    """Yields the images in order, uint8 [b, h, w, 3]; the last batch may be smaller.

    Raises:
      ValueError: the file is damaged.
    """
    with npz.opened(self._path) as archive, npz.open_array(archive, _IMAGES) as stream:
      npz.header(archive, _IMAGES, stream)
      for start in range(0, self.shape[0], batch_size):
        shape = (min(batch_size, self.shape[0] - start), *self.shape[1:])
        images = np.frombuffer(stream.read(math.prod(shape)), np.uint8).reshape(shape)
        if start + len(images) == self.shape[0]:
          stream.read()  # to the end, so that the checksum is compared
        yield images


def _checked(path: str | os.PathLike, statistics: Mapping[str, np.ndarray]) -> dict[str, Any]:
  checked: dict[str, np.ndarray] = {}
  for pair in PAIRS:
    given = [name for name in pair if name in statistics]
    if len(given) == 1:
      raise ValueError(f"{path} has only {given[0]} of {' and '.join(pair)}: compute these statistics again")
    if given:
      try:
        checked.update(zip(pair, checked_gaussian(*(statistics[name] for name in pair))))
      except ValueError as e:
        raise ValueError(f"{path}, {' and '.join(pair)}: {e}") from None
  return checked
