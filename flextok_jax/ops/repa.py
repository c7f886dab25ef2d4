"""Representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940): the loss between two sets of patch features."""

import jax
import jax.numpy as jnp

_EPS = 1e-24  # least squared norm: that of torch.nn.functional.normalize, which the code of the paper calls


def scaled_grid(grid: int, side: int, shape: tuple[int, int]) -> tuple[int, int]:
  """Returns rows and columns of the grid of a shape (height, width), for grid x grid patches of side x side."""
  rows, columns = (max(round(grid * length / side), 1) for length in shape)
  return rows, columns


def resize_features(features: jax.Array, height: int, width: int, grid: tuple[int, int] | None = None) -> jax.Array:
  """Resizes features of a grid bilinearly, in float32: [b, rows * columns, d] -> [b, height * width, d].

  Args:
    features: in row-major order.
    height: rows of the result.
    width: its columns.
    grid: (rows, columns); None: a square.

  Raises:
    ValueError: there are not as many features.
  """
  batch, count, dim = features.shape
  rows, columns = grid or (round(count**0.5),) * 2
  if rows * columns != count:
    raise ValueError(f"{count} features do not form a {f'grid of {rows} x {columns}' if grid else 'square grid'}")
  if (rows, columns) == (height, width):
    return features
  features = features.reshape(batch, rows, columns, dim).astype(jnp.float32)
  return jax.image.resize(features, (batch, height, width, dim), "bilinear").reshape(batch, height * width, dim)


def alignment_loss(projected: jax.Array, teacher: jax.Array) -> jax.Array:
  """Returns minus the cosine of the two vectors of each patch, mean over patches: [b, n, d] twice -> float32 [b]."""
  x, y = projected.astype(jnp.float32), teacher.astype(jnp.float32)
  inverse = lambda x: jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1), _EPS))
  return -((x * y).sum(-1) * inverse(x) * inverse(y)).mean(-1)
