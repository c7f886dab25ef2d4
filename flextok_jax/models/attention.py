"""Attention of the tokenizer's transformers."""

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers

UNSEEN = float(jnp.finfo(jnp.float32).min) / 2  # key bias of a key that nobody sees: its weight is exactly 0


class Attention(nn.Module):
  """Multi-head self-attention; logits scale by 8 / head_dim (muP), q and k are layer-normed per head if qk_norm."""

  head_dim: int
  qk_norm: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None, key_bias: jax.Array | None = None) -> jax.Array:
    """Lets every position of x see the others.

    Args:
      x: [b, l, d].
      mask: boolean [l, l] (query, key), True where seen.
      key_bias: float32 [b, l], added to all logits of a key: UNSEEN hides it, log(n) makes it count n times.

    Returns:
      [b, l, d].
    """
    width = x.shape[-1]
    qkv = nn.DenseGeneral(
        (3, width // self.head_dim, self.head_dim),
        use_bias=self.qkv_bias,
        dtype=self.dtype,
        kernel_init=layers.xavier_uniform(width, ("embed", None, "heads", "head_dim")),
        bias_init=layers.zeros(None, "heads", "head_dim"),
        name="qkv",
    )(x)
    q, k, v = rearrange(qkv, "b l n h d -> n b l h d")
    if self.qk_norm:
      q, k = layers.layer_norm(q), layers.layer_norm(k)
    if mask is not None:
      mask = mask[None, None]  # [1, 1, l, l]
    if key_bias is not None:
      key_bias = key_bias[:, None, None]  # [b, 1, 1, l]
    scale = 8 / self.head_dim
    x = jax.nn.dot_product_attention(q, k, v, bias=key_bias, mask=mask, scale=scale)  # softmax in float32
    return nn.DenseGeneral(
        width,
        axis=(-2, -1),
        use_bias=self.out_bias,
        dtype=self.dtype,
        kernel_init=layers.xavier_uniform(width, ("heads", "head_dim", "embed")),
        bias_init=layers.zeros("embed"),
        name="out",
    )(x)
