"""Tables of grid positions, and sinusoidal features of time."""

import jax
import jax.numpy as jnp
import numpy as np


def sincos_axes(rows: np.ndarray | int, columns: np.ndarray | int, dim: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns a row table [n, dim] and a column table [m, dim], float64: [sin, cos, 0, 0] and [0, 0, sin, cos].

  The angles are position * 10000^(-4j/dim). Computed on the host, as the tables are constants.

  Args:
    rows: positions of the rows [n]; or n, for 0 to n - 1.
    columns: positions of the columns [m]; or m, for 0 to m - 1.
    dim: of a position, a multiple of 4.

  Raises:
    ValueError: dim is not a multiple of 4.
  """
  if dim % 4:
    raise ValueError(f"a 2D sin-cos table needs a width that is a multiple of 4, got {dim}")
  frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))

  def axis(positions: np.ndarray | int, before: int, after: int) -> np.ndarray:
    angles = (np.arange(positions) if isinstance(positions, int) else positions)[:, None] * frequencies
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)], -1), ((0, 0), (before, after)))

  return axis(rows, 0, dim // 2), axis(columns, dim // 2, 0)


def scaled_axes(shape: tuple[int, int], height: int, width: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns sincos_axes of height rows and width columns whose positions in [0, 1] are scaled to those of a shape.

  Row i is at i / (height - 1) of the way from the first to the last of the shape's rows, columns likewise: a grid of
  the shape itself has the positions 0, 1, 2, ... Unlike resizing a table, it keeps the norm of every vector.
  """
  return sincos_axes(_places(height, shape[0]), _places(width, shape[1]), dim)


def grid_table(
  axes: tuple[jax.Array | np.ndarray, jax.Array | np.ndarray],
  height: int,
  width: int,
  *,
  scaling: str = "absolute",
  product: bool = False,
) -> jax.Array:
  """Returns the table [height, width, dim] of sums (or products) of a row vector and a column vector.

  Args:
    axes: row table [n, dim] and column table [m, dim].
    height: rows of the grid.
    width: columns of the grid.
    scaling: "absolute" crops a corner of the n x m table; "interpolate" resizes all of it bilinearly, with aligned
      corners. A sum or product of two axes is resized by resizing each axis.
    product: multiply the two vectors.

  Raises:
    ValueError: the grid is larger than the table to crop.
  """
  if scaling == "absolute":
    check_fits((len(axes[0]), len(axes[1])), height, width)
    rows, cols = axes[0][:height], axes[1][:width]
  else:
    rows, cols = resize_axis(axes[0], height), resize_axis(axes[1], width)
  rows, cols = rows[:, None], cols[None]
  return jnp.asarray(rows * cols if product else rows + cols, jnp.float32)


def released_table(shape: tuple[int, int], dim: int) -> np.ndarray:
  """Returns the sin-cos table [n, m, dim] of the released code, float64, for a shape (n, m).

  That code computes a table of m rows and n columns, and reads its positions in their order as n rows of m: the same
  as sincos_axes describes if n = m only.
  """
  rows, columns = sincos_axes(shape[1], shape[0], dim)
  return (rows[:, None] + columns[None]).reshape(*shape, dim)


def fit_table(table: np.ndarray, height: int, width: int, *, scaling: str = "absolute") -> jax.Array:
  """Returns a table [n, m, dim] for a grid, [height, width, dim], as grid_table does for two axes."""
  if scaling == "absolute":
    check_fits(table.shape[:2], height, width)
    return jnp.asarray(table[:height, :width], jnp.float32)
  columns_first = np.asarray(resize_axis(table, height)).swapaxes(0, 1)
  return jnp.asarray(np.asarray(resize_axis(columns_first, width)).swapaxes(0, 1), jnp.float32)


def check_fits(shape: tuple[int, ...], height: int, width: int) -> None:
  """Raises ValueError if a grid is larger than a table of a shape (n, m)."""
  if height > shape[0] or width > shape[1]:
    size = str(shape[0]) if shape[0] == shape[1] else f"{shape[0]} x {shape[1]}"
    raise ValueError(
      f"a grid of {height} x {width} patches does not fit max_grid {size}: give a smaller image, "
      "or set posemb_scaling to 'interpolate' or 'scaled'"
    )


def resize_axis(table: jax.Array | np.ndarray, size: int) -> jax.Array | np.ndarray:
  """Linearly interpolates a table [n, ...] at size points from its first row to its last: [size, ...]."""
  place = _places(size, len(table))
  low = place.astype(np.int32)
  part = (place - low).reshape(-1, *[1] * (table.ndim - 1))
  return table[low] * (1 - part) + table[np.minimum(low + 1, len(table) - 1)] * part


def _places(count: int, size: int) -> np.ndarray:
  """Returns `count` positions, evenly from 0 to size - 1; one position is 0."""
  return np.arange(count) * (size - 1) / max(count - 1, 1)


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
  return grid_table(sincos_axes(height, width, dim), height, width)


def timestep_features(t: jax.Array, dim: int = 256, max_period: float = 256.0, time_scale: float = 1000.0) -> jax.Array:
  """Returns [cos, sin] features [b, dim] of times t [b] in [0, 1]: frequencies time_scale * max_period^(-j/(dim/2))."""
  # A constant, computed on the host: angles reach 1000, where the rounding of a frequency matters.
  freqs = np.float32(time_scale * np.exp(-np.log(max_period) * np.arange(dim // 2) / (dim // 2)))
  angles = t.astype(jnp.float32)[:, None] * freqs
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
