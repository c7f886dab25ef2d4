"""The scaling factor of a VAE: one over the standard deviation of its latents (Rombach et al. 2022)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flextok_jax.parallel import batching, sharding


class ScalingFactor:
  """Measures one over the standard deviation of all values of a VAE's latents, which are posterior samples.

  Means and mean squares are computed per image, in closed form and not by sampling, and summed in float64. So the
  factor does not depend on the batch size, except for rounding.

  Args:
    moments: (params, images [b, h, w, 3]) -> means of latents and of their squares [b], of predict_fns of stage "vae".
    eval_sets: {name: uint8 [n, h, w, 3]}, used together.
    batch_size: images per batch, at most.
    mesh: devices that batches are split over.
  """

  def __init__(self, moments: Callable, eval_sets: Mapping[str, Any], batch_size: int, mesh: jax.sharding.Mesh):
    self._images, self._mesh = list(eval_sets.values()), mesh
    self._batch_size = batching.batch_rows(batch_size, batch_size, mesh)
    self._moments = jax.jit(moments, out_shardings=sharding.replicated(mesh))

  def __call__(self, params: Any) -> float:
    """Returns the factor.

    Raises:
      ValueError: it is not finite.
    """
    sums, count = np.zeros(2), 0
    function = lambda images: self._moments(params, images)
    for images in self._images:
      batches = batching.slices(images, self._batch_size)
      for moments in batching.map_batches(function, batches, self._batch_size, self._mesh):
        sums += np.asarray(moments, np.float64).sum(1)
        count += len(moments[0])
    mean, square = sums / count
    with np.errstate(all="ignore"):
      factor = float((square - mean**2) ** -0.5)
    if not np.isfinite(factor):
      raise ValueError(f"the latents have no scaling factor: mean {mean:g}, mean of squares {square:g}")
    return factor
