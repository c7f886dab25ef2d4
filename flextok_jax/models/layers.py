"""Small pieces that every model shares."""

import functools
import math

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS = {
  "silu": nn.silu,
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
  "relu": nn.relu,
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
}


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


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  name: str,
  dtype: jnp.dtype,
  *,
  use_bias: bool = True,
  zero: bool = False,
  precision: jax.lax.Precision | None = None,
) -> nn.Dense:
  """Returns a linear layer with named axes; its kernel starts Xavier-uniform or at zero, its bias at zero."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=dtype,
    precision=precision,
    kernel_init=zeros(*axes) if zero else xavier_uniform(features, axes),
    bias_init=zeros(axes[1]),
    name=name,
  )


def patchify(x: jax.Array, patch: int) -> jax.Array:
  """[b, h, w, c] -> [b, h/patch, w/patch, patch*patch*c], each vector ordered (row, column, channel)."""
  return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def unpatchify(x: jax.Array, patch: int) -> jax.Array:
  """The inverse of patchify."""
  return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)
