"""Tables of grid positions, and sinusoidal features of time."""

import jax
import jax.numpy as jnp
import numpy as np


def sincos_axes(size: int, dim: int) -> np.ndarray:
  """Returns the row table and the column table [2, size, dim], float64: [sin, cos, 0, 0] and [0, 0, sin, cos].

  The angles are position * 10000^(-4j/dim). Computed on the host, as the table is a constant.

  Raises:
    ValueError: dim is not a multiple of 4.
  """
  if dim % 4:
    raise ValueError(f"a 2D sin-cos table needs a width that is a multiple of 4, got {dim}")
  angles = np.arange(size)[:, None] * 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
  axis = np.concatenate([np.sin(angles), np.cos(angles)], -1)  # [size, dim / 2]
  return np.stack([np.pad(axis, ((0, 0), (0, dim // 2))), np.pad(axis, ((0, 0), (dim // 2, 0)))])


def grid_table(
  axes: jax.Array | np.ndarray, height: int, width: int, *, scaling: str = "absolute", product: bool = False
) -> jax.Array:
  """Returns the table [height, width, dim] of sums (or products) of a row vector and a column vector.

  Args:
    axes: row table and column table [2, size, dim].
    height: rows of the grid.
    width: columns of the grid.
    scaling: "absolute" crops a corner of the size x size table; "interpolate" resizes all of it bilinearly, with
      aligned corners. A sum or product of two axes is resized by resizing each axis.
    product: multiply the two vectors.

  Raises:
    ValueError: the grid is larger than the table to crop.
  """
  size = axes.shape[1]
  if scaling == "absolute":
    if max(height, width) > size:
      raise ValueError(
        f"a grid of {height} x {width} patches does not fit max_grid {size}: give a smaller image, "
        "or set posemb_scaling to 'interpolate'"
      )
    rows, cols = axes[0, :height], axes[1, :width]
  else:
    rows, cols = resize_axis(axes[0], height), resize_axis(axes[1], width)
  rows, cols = rows[:, None], cols[None]
  return jnp.asarray(rows * cols if product else rows + cols, jnp.float32)


def resize_axis(table: jax.Array | np.ndarray, size: int) -> jax.Array | np.ndarray:
  """Linearly interpolates a table [n, dim] at size points from its first row to its last: [size, dim]."""
  last = len(table) - 1
  place = np.arange(size) * last / max(size - 1, 1)  # one point: the first row
  low = place.astype(np.int32)
  part = (place - low)[:, None]
  return table[low] * (1 - part) + table[np.minimum(low + 1, last)] * part


def resize_bicubic(
  table: jax.Array, height: int, width: int, *, antialias: bool = False, offset: float = 0.0
) -> jax.Array:
  """Interpolates a table [n, m, dim] to [height, width, dim], as torch.nn.functional.interpolate(mode="bicubic").

  Args:
    table: any floating-point type; computed in float32.
    height: rows of the result.
    width: its columns.
    antialias: whether to widen the kernel if the table shrinks.
    offset: the factors are (height + offset) / n and (width + offset) / m; the code of DINO has 0.1. Ignored with
      antialias.

  Returns:
    float32.
  """
  table = table.astype(jnp.float32)
  if antialias:
    return jax.image.resize(table, (height, width, table.shape[-1]), "cubic", antialias=True)
  rows, cols = (_cubic_weights(old, new, offset) for old, new in zip(table.shape, (height, width)))
  return jnp.einsum("hn,wm,nmd->hwd", rows, cols, table, precision="highest")


def _cubic_weights(old: int, new: int, offset: float) -> np.ndarray:
  """Returns the float32 matrix [new, old] of the cubic convolution of PyTorch: a = -0.75, borders replicated."""
  a, weights = -0.75, np.zeros((new, old))
  place = (np.arange(new) + 0.5) * old / (new + offset) - 0.5
  for k in range(-1, 3):
    source = np.floor(place).astype(int) + k
    d = np.abs(place - source)
    near, far = ((a + 2) * d - (a + 3)) * d**2 + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights[np.arange(new), np.clip(source, 0, old - 1)] += np.where(d <= 1, near, far)
  return weights.astype(np.float32)


def sincos_2d(height: int, width: int, dim: int) -> jax.Array:
  """Returns the table [height, width, dim]: [sin(row w), cos(row w), sin(col w), cos(col w)], w_j = 10000^(-4j/dim).

  A smaller grid is the corner of a larger one.

  Raises:
    ValueError: dim is not a multiple of 4.
  """
  return grid_table(sincos_axes(max(height, width), dim), height, width)


def timestep_features(t: jax.Array, dim: int = 256, max_period: float = 256.0, time_scale: float = 1000.0) -> jax.Array:
  """Returns [cos, sin] features [b, dim] of times t [b] in [0, 1]: frequencies time_scale * max_period^(-j/(dim/2))."""
  # A constant, computed on the host: angles reach 1000, where the rounding of a frequency matters.
  freqs = np.float32(time_scale * np.exp(-np.log(max_period) * np.arange(dim // 2) / (dim // 2)))
  angles = t.astype(jnp.float32)[:, None] * freqs
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
