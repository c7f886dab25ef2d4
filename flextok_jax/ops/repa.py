"""Representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940): the loss between two sets of patch features."""

import jax
import jax.numpy as jnp

_EPS = 1e-24  # least squared norm: that of torch.nn.functional.normalize, which the code of the paper calls


def resize_features(features: jax.Array, height: int, width: int) -> jax.Array:
  """Resizes features of a square grid bilinearly, in float32: [b, g * g, d] -> [b, height * width, d].

  Raises:
    ValueError: the number of features is not a square.
  """
  batch, count, dim = features.shape
  grid = round(count**0.5)
  if grid**2 != count:
    raise ValueError(f"{count} features do not form a square grid")
  if (grid, grid) == (height, width):
    return features
  features = features.reshape(batch, grid, grid, dim).astype(jnp.float32)
  return jax.image.resize(features, (batch, height, width, dim), "bilinear").reshape(batch, height * width, dim)


def alignment_loss(projected: jax.Array, teacher: jax.Array) -> jax.Array:
  """Returns minus the cosine of the two vectors of each patch, mean over patches: [b, n, d] twice -> float32 [b]."""
  x, y = projected.astype(jnp.float32), teacher.astype(jnp.float32)
  inverse = lambda x: jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1), _EPS))
  return -((x * y).sum(-1) * inverse(x) * inverse(y)).mean(-1)
