"""Fixed sinusoidal features of grid positions and of time, float32."""

import jax
import jax.numpy as jnp
import numpy as np


def sincos_2d(height: int, width: int, dim: int) -> jax.Array:
  """Returns the table [height, width, dim]: [sin(row w), cos(row w), sin(col w), cos(col w)], w_j = 10000^(-4j/dim).

  A smaller grid is the corner of a larger one. Computed in float64 on the host, as the table is a constant.

  Raises:
    ValueError: when dim is not a multiple of 4.
  """
  if dim % 4:
    raise ValueError(f"a 2D sin-cos table needs a width that is a multiple of 4, got {dim}")
  omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
  row = np.broadcast_to((np.arange(height)[:, None] * omega)[:, None], (height, width, dim // 4))
  col = np.broadcast_to((np.arange(width)[:, None] * omega)[None], (height, width, dim // 4))
  table = np.concatenate([np.sin(row), np.cos(row), np.sin(col), np.cos(col)], -1)
  return jnp.asarray(table, jnp.float32)


def timestep_features(t: jax.Array, dim: int = 256, max_period: float = 256.0, time_scale: float = 1000.0) -> jax.Array:
  """Returns [cos, sin] features [b, dim] of times t [b] in [0, 1]: frequencies time_scale * max_period^(-j/(dim/2))."""
  freqs = time_scale * jnp.exp(-jnp.log(max_period) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
  angles = t.astype(jnp.float32)[:, None] * freqs
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
