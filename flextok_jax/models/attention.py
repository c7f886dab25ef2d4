"""Attention of the tokenizer's transformers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.ops import attention, layout


class QKV(nn.Module):
  """Queries, keys and values in one projection."""

  head_dim: int
  use_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, queries: tuple[int, int] | None = None) -> list[jax.Array]:
    """x [b, l, d] -> q [b, length, h, e] of the positions queries = (start, length) or of all, k and v [b, l, h, e]."""
    width = x.shape[-1]
    shape = (3, width // self.head_dim, self.head_dim)
    init = layers.xavier_uniform(width, ("embed", None, "heads", "head_dim"))
    kernel = self.param("kernel", init, (width, *shape)).astype(self.dtype)
    bias = jnp.zeros(shape, self.dtype)
    if self.use_bias:
      bias = self.param("bias", layers.zeros(None, "heads", "head_dim"), shape).astype(self.dtype)

    def project(x, which):
      y = jnp.tensordot(x.astype(self.dtype), kernel[:, which], 1)  # [b, l, n, h, e]
      y = y + bias[which] if self.use_bias else y
      return [layout.constrain(y[:, :, i], "batch", None, "heads", None) for i in range(y.shape[2])]

    if queries is None:
      return project(x, slice(None))
    start, length = queries
    return project(x[:, start : start + length], slice(0, 1)) + project(x, slice(1, 3))


class Attention(nn.Module):
  """Multi-head self-attention; logits scale by 8 / head_dim (muP), q and k are layer-normed per head if qk_norm."""

  head_dim: int
  qk_norm: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  dtype: jnp.dtype = jnp.float32
  implementation: str = "auto"
  scale: float | None = None  # of the logits, where it is another

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    queries: tuple[int, int] | None = None,
  ) -> jax.Array:
    """Lets positions of x see the others.

    Args:
      x: [b, l, d].
      mask: boolean [l, l] (query, key), True where seen.
      key_bias: float32 [b or 1, l], added to all logits of a key: UNSEEN hides it, log(n) makes it count n times.
      queries: (start, length) of the positions that look, or None for all.

    Returns:
      [b, length, d].
    """
    width = x.shape[-1]
    if queries is not None:
      start, length = queries
      if start < 0 or length < 1 or start + length > x.shape[1]:
        raise ValueError(f"queries (start, length) = {queries} are not among the {x.shape[1]} positions")
      mask = None if mask is None else mask[start : start + length]
    q, k, v = QKV(self.head_dim, self.qkv_bias, self.dtype, name="qkv")(x, queries)
    if self.qk_norm:
      q, k = layers.layer_norm(q), layers.layer_norm(k)
    scale = 8 / self.head_dim if self.scale is None else self.scale
    x = attention.attend(q, k, v, scale=scale, mask=mask, key_bias=key_bias, implementation=self.implementation)
    return nn.DenseGeneral(
      width,
      axis=(-2, -1),
      use_bias=self.out_bias,
      dtype=self.dtype,
      kernel_init=layers.xavier_uniform(width, ("heads", "head_dim", "embed")),
      bias_init=layers.zeros("embed"),
      name="out",
    )(x)
