"""What samples are compared with: statistics and images of a reference set, by the FID's Inception."""

from collections.abc import Callable, Iterable
import dataclasses
import os

import jax
import numpy as np

from flextok_jax.evals.metrics import frechet as statistics
from flextok_jax.evals.metrics import statistics_files
from flextok_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Reference:
  """A reference set.

  Attributes:
    gaussians: {"pool": (mean [d], covariance [d, d]), "spatial": ...}, what there is of them.
    pools: float32 [n, d], features of its images; None where there are no images.
  """

  gaussians: dict[str, tuple[np.ndarray, np.ndarray]]
  pools: np.ndarray | None


def load(path: str | os.PathLike, look: Callable[[np.ndarray], dict], batch_size: int, images: bool) -> Reference:
  """Returns the reference in a .npz file, statistics or images or both (evals/metrics/statistics_files.py).

  Args:
    look: uint8 [b, h, w, 3] -> {"pool" [b, d], "spatial" [b, e]}, for images.
    batch_size: images at once.
    images: whether features of single images are needed; else statistics suffice.

  Raises:
    FileNotFoundError, ValueError: as of evals/metrics/statistics_files.py, or no images where they are needed.
  """
  names = statistics_files.contents(path)
  if "mu" in names and not images:
    found = statistics_files.load_statistics(path)
    gaussians = {"pool": (found["mu"], found["sigma"])}
    if "mu_s" in found:
      gaussians["spatial"] = (found["mu_s"], found["sigma_s"])
    return Reference(gaussians, None)
  if "arr_0" not in names:
    raise ValueError(f"{path} has statistics alone: precision and recall compare single images, give a .npz with arr_0")
  file = statistics_files.SampleFile(path)
  seen = look_at(file.batches(batch_size), look)
  if "mu" in names:  # the publisher's own
    seen = dataclasses.replace(seen, gaussians=load(path, look, batch_size, False).gaussians)
  return seen


def look_at(batches: Iterable[np.ndarray], look: Callable[[np.ndarray], dict]) -> Reference:
  """Returns the reference of images that come in batches, uint8 [b, h, w, 3]; look as of load."""
  moments, pools = {}, []
  for images in batches:
    features = look(images)
    for layer, array in features.items():
      if layer not in moments:
        moments[layer] = statistics.Moments(array.shape[1])
      moments[layer].add(array)
    pools.append(features["pool"])
  return Reference({layer: (m.mean, m.covariance()) for layer, m in moments.items()}, np.concatenate(pools))


def save(path: str | os.PathLike, reference: Reference):
  """Writes the statistics, as evals/metrics/statistics_files.py does."""
  names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
  arrays = {name: x for layer, pair in reference.gaussians.items() for name, x in zip(names[layer], pair)}
  statistics_files.save_statistics(path, arrays)


def make_look(inception: jax.tree_util.Partial, batch_size: int, mesh: jax.sharding.Mesh) -> Callable:
  """Returns `look` over a mesh, for batches of up to batch_size, which must divide over it."""
  placed, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def features(inception, images):
    found = inception(images.astype(np.float32) / 255)
    return {layer: found[layer] for layer in ("pool", "spatial")}

  compiled = jax.jit(features, out_shardings=replicated)
  inception = sharding.place(inception, replicated)

  def look(images):
    rows = np.minimum(np.arange(batch_size), len(images) - 1)  # the last batch is padded
    found = jax.device_get(compiled(inception, sharding.place(images[rows], placed)))
    return {layer: array[: len(images)] for layer, array in found.items()}

  return look
