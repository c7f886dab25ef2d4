"""Small pieces that every model shares."""

import math

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp


def layer_norm(x: jax.Array, eps: float = 1e-5) -> jax.Array:
  """Normalises the last axis without affine parameters, in float32; returns x's dtype."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
  return y.astype(x.dtype)


def xavier_uniform(fan_out: int, axes: tuple[str | None, ...]):
  """Xavier-uniform initialiser of kernels [fan_in, n * fan_out] that fuse n linear maps, with logical axis names."""

  def init(key, shape, dtype=jnp.float32):
    limit = math.sqrt(6 / (shape[0] + fan_out))
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return nn.with_logical_partitioning(init, axes)


def zeros(*axes: str | None):
  return nn.with_logical_partitioning(nn.initializers.zeros, axes)


def normal(stddev: float, *axes: str | None):
  return nn.with_logical_partitioning(nn.initializers.normal(stddev), axes)


def patchify(x: jax.Array, patch: int) -> jax.Array:
  """[b, h, w, c] -> [b, h/patch, w/patch, patch*patch*c], each vector ordered (row, column, channel)."""
  return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def unpatchify(x: jax.Array, patch: int) -> jax.Array:
  """The inverse of patchify."""
  return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)
