"""How large a VAE's latents are, for the factor that brings them to deviation 1 (Rombach et al. 2022)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flextok_jax.parallel.sharding import place


class ScalingFactor:
  """Measures one over the deviation of a VAE's latents, over all their values, samples of the posterior.

  Means and squares are of whole images, in closed form and not by sampling, and summed in float64: the same whatever
  the batch size, but for rounding.

  Args:
    moments: (params, images [b, h, w, 3]) -> means of latents and of their squares [b], of predict_fns of stage "vae".
    eval_sets: {name: uint8 [n, h, w, 3]}, taken together.
    batch_size: images at once.
    sharding: of batches, as Reconstruction's.
  """

  def __init__(
    self, moments: Callable, eval_sets: Mapping[str, np.ndarray], batch_size: int, sharding: jax.sharding.NamedSharding
  ):
    self._images, self._sharding = list(eval_sets.values()), sharding
    self._batch_size = -(-batch_size // sharding.num_devices) * sharding.num_devices
    self._moments = jax.jit(moments, out_shardings=jax.NamedSharding(sharding.mesh, jax.P()))

  def __call__(self, params: Any) -> float:
    """Returns the factor.

    Raises:
      ValueError: it is no finite number.
    """
    sums, count = np.zeros(2), 0
    for images in self._images:
      for start in range(0, len(images), self._batch_size):
        rows = images[start : start + self._batch_size]
        padded = np.pad(rows, ((0, self._batch_size - len(rows)), (0, 0), (0, 0), (0, 0)), mode="edge")
        found = jax.device_get(self._moments(params, place(padded, self._sharding)))
        sums += np.asarray(found, np.float64)[:, : len(rows)].sum(1)
        count += len(rows)
    mean, square = sums / count
    with np.errstate(all="ignore"):
      factor = float((square - mean**2) ** -0.5)
    if not np.isfinite(factor):
      raise ValueError(f"the latents have no scaling factor: mean {mean:g}, mean of squares {square:g}")
    return factor
