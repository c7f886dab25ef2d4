"""Reference sets that samples are compared with: statistics and features of their images, by the FID's Inception."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import os

import jax
import numpy as np

from flextok_jax.core.progress import track
from flextok_jax.evals.metrics import frechet
from flextok_jax.parallel import batching, sharding

# Batches of images uint8 [b, h, w, 3] -> their features {"pool": [b, d], "spatial": [b, e]}.
Extract = Callable[[Iterable[np.ndarray]], Iterator[dict[str, np.ndarray]]]

_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of the statistics in files


@dataclasses.dataclass(frozen=True)
class Reference:
  """A reference set.

  Attributes:
    gaussians: {"pool": (mean [d], covariance [d, d]), "spatial": ...}, those that are known.
    pools: float32 [n, d], features of its images; None without images.
    num_images: number of its images; None if unknown.
  """

  gaussians: dict[str, tuple[np.ndarray, np.ndarray]]
  pools: np.ndarray | None
  num_images: int | None


def from_features(features: Iterable[dict[str, np.ndarray]]) -> Reference:
  """Returns the reference set of images whose features come in batches, as an Extract yields them."""
  moments: dict[str, frechet.Moments] = {}
  pools = []
  for batch in features:
    for layer, array in batch.items():
      if layer not in moments:
        moments[layer] = frechet.Moments(array.shape[1])
      moments[layer].add(array)
    pools.append(batch["pool"])
  if not pools:
    raise ValueError("the reference has no images")
  gaussians = {layer: (m.mean, m.covariance()) for layer, m in moments.items()}
  return Reference(gaussians, np.concatenate(pools), moments["pool"].count)


def load(
  name: str, open_images: Callable[[str], Iterable[np.ndarray]], extract: Extract, batch_size: int, need_images: bool
) -> Reference:
  """Loads a reference set.

  Args:
    name: of a .npz file of statistics, images or both (see evals/metrics/frechet.py), or anything else with images.
    open_images: such a name -> batches of its images uint8 [b, h, w, 3].
    extract: computes the features of images.
    batch_size: images per batch.
    need_images: whether the features of single images are needed; otherwise statistics suffice.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a damaged file, or no images although they are needed.
  """
  if not name.endswith(".npz"):
    computed = from_features(_shown(extract(open_images(name))))
    return dataclasses.replace(computed, pools=computed.pools if need_images else None)
  names = frechet.array_names(name)
  gaussians = {}
  if "mu" in names:
    found = frechet.load_statistics(name)
    gaussians = {layer: (found[mu], found[sigma]) for layer, (mu, sigma) in _NAMES.items() if mu in found}
    if not need_images:
      return Reference(gaussians, None, frechet.count_images(name))
  if "arr_0" not in names:
    raise ValueError(f"{name} has only statistics: precision and recall compare single images, give a .npz with arr_0")
  computed = from_features(_shown(extract(frechet.SampleFile(name).batches(batch_size))))
  # Statistics in the file are the publisher's own.
  return dataclasses.replace(computed, gaussians=gaussians or computed.gaussians)


def _shown(features: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
  return track(features, None, "images of the reference", size=lambda batch: len(batch["pool"]))


def save(path: str | os.PathLike, reference: Reference):
  """Writes the statistics to a .npz file (see evals/metrics/frechet.py)."""
  arrays = {name: x for layer, pair in reference.gaussians.items() for name, x in zip(_NAMES[layer], pair)}
  frechet.save_statistics(path, arrays, reference.num_images)


def make_extract(inception: jax.tree_util.Partial, batch_size: int, mesh: jax.sharding.Mesh) -> Extract:
  """Returns a function that computes Inception's features of batches of up to batch_size images, over a mesh."""
  size = batching.batch_rows(batch_size, batch_size, mesh)

  def features(inception, images):
    found = inception(images.astype(np.float32) / 255)
    return {layer: found[layer] for layer in _NAMES}

  compiled = jax.jit(features, out_shardings=sharding.replicated(mesh))
  inception = batching.replicate(inception, mesh)
  return lambda batches: batching.map_batches(lambda images: compiled(inception, images), batches, size, mesh)
