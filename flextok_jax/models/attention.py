"""Attention of the tokenizer's transformers."""

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers


class Attention(nn.Module):
  """Multi-head self-attention without biases; q and k are layer-normed per head; logits scale by 8 / head_dim (muP)."""

  head_dim: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """x [b, l, d], mask [l, l] boolean (query, key), True where seen -> [b, l, d]."""
    width = x.shape[-1]
    qkv = nn.DenseGeneral(
        (3, width // self.head_dim, self.head_dim),
        use_bias=False,
        dtype=self.dtype,
        kernel_init=layers.xavier_uniform(width, ("embed", None, "heads", "head_dim")),
        name="qkv",
    )(x)
    q, k, v = rearrange(qkv, "b l n h d -> n b l h d")
    q, k = layers.layer_norm(q), layers.layer_norm(k)
    if mask is not None:
      mask = mask[None, None]
    x = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=8 / self.head_dim)  # softmax in float32
    return nn.DenseGeneral(
        width,
        axis=(-2, -1),
        use_bias=False,
        dtype=self.dtype,
        kernel_init=layers.xavier_uniform(width, ("heads", "head_dim", "embed")),
        name="out",
    )(x)
