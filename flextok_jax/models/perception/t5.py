"""The encoder of T5 (Raffel et al. 2020), also of FLAN-T5: T5 version 1.1, with a gated MLP."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models import layers
from flextok_jax.ops import layout


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
  """Returns the bucket of every pair of positions, int32 [length, length] (query, key).

  Half of the buckets are for keys after the query. In each half, the first half of the buckets hold one distance each;
  the others are spaced logarithmically up to max_distance, and larger distances share the last one.
  """
  position = np.arange(length)
  distance = position - position[:, None]
  half = num_buckets // 2
  exact = half // 2
  ahead, distance = half * (distance > 0), np.abs(distance)
  # In float32, as the original: its rounding decides the bucket of a distance on a border.
  log = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
  far = exact + (log / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
  return (ahead + np.where(distance < exact, distance, np.minimum(far, half - 1))).astype(np.int32)


class T5Block(nn.Module):
  """Pre-norm self-attention and MLP. The stream is float32; products are computed in dtype."""

  num_heads: int
  d_kv: int
  d_ff: int
  layer_norm_epsilon: float
  gated: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array, lengths: jax.Array) -> jax.Array:
    """x float32 [b, t, d], bias float32 [1, h, t, t], lengths int32 [b] -> [b, t, d] float32."""
    width, heads = x.shape[-1], ("heads", "head_dim")
    x = layout.constrain(x, "batch", None, None)
    # Products that are added to the stream accumulate and return float32: some features of T5 exceed 10,000.
    stream = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype)

    h = layers.norm("rmsnorm", self.layer_norm_epsilon, self.dtype, "norm_1")(x)
    init = layers.xavier_uniform(self.num_heads * self.d_kv, ("embed", None, *heads))
    qkv = dense((3, self.num_heads, self.d_kv), kernel_init=init, name="qkv")(h)  # [b, t, 3, h, e]
    # Unscaled; logits, bias and softmax in float32. ops/attention.py takes no bias of pairs of positions.
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    h = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=1.0, key_value_seq_lengths=lengths, implementation="xla")
    init = layers.xavier_uniform(width, (*heads, "embed"))
    x = x + dense(width, axis=(-2, -1), kernel_init=init, dot_general=stream, name="attention_out")(h)

    h = layers.norm("rmsnorm", self.layer_norm_epsilon, self.dtype, "norm_2")(x)
    init = layers.xavier_uniform(self.d_ff, ("embed", None, "mlp"))
    h = dense((2 if self.gated else 1, self.d_ff), kernel_init=init, name="mlp_in")(h)  # [b, t, n, d_ff]
    h = nn.gelu(h[..., 0, :]) * h[..., 1, :] if self.gated else nn.relu(h[..., 0, :])
    init = layers.xavier_uniform(width, ("mlp", "embed"))
    return x + dense(width, kernel_init=init, dot_general=stream, name="mlp_out")(h)


class T5Encoder(nn.Module):
  """Token ids to features. The fields have the names of a Hugging Face config.json, except for `gated`.

  Its parameters are meant to be loaded (weights/perception/t5.py); their initialisation is that of the other models
  here, not that of T5. The stream between the blocks, norms, logits, softmax and position bias are float32 for every
  dtype. Do not use float16: the hidden layer of the MLP may exceed its range.
  """

  vocab_size: int
  d_model: int
  d_kv: int  # of a head
  d_ff: int
  num_layers: int
  num_heads: int
  relative_attention_num_buckets: int
  relative_attention_max_distance: int
  layer_norm_epsilon: float
  gated: bool  # tanh-GELU(W1 x) * W3 x, as in version 1.1; False: relu(W1 x), as in version 1.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Encodes texts.

    Args:
      ids: int32 [b, t]; those at or past the length have no effect.
      lengths: int32 [b], at least 1.

    Returns:
      Features [b, t, d_model] of dtype; those at or past the length are meaningless.
    """
    init = layers.normal(1.0, "vocab", "embed")
    x = self.param("embedding", init, (self.vocab_size, self.d_model))[ids].astype(jnp.float32)
    init = layers.normal(self.d_model**-0.5, None, "heads")
    table = self.param("relative_bias", init, (self.relative_attention_num_buckets, self.num_heads))
    buckets = relative_buckets(ids.shape[1], self.relative_attention_num_buckets, self.relative_attention_max_distance)
    bias = table.astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]  # [1, h, t, t], the same in all blocks
    block = T5Block(
      self.num_heads, self.d_kv, self.d_ff, self.layer_norm_epsilon, self.gated, self.dtype, name="blocks"
    )
    step = lambda block, x, _, bias, lengths: block(x, bias, lengths)
    x = layers.scan_blocks(step, self.num_layers, block, x, None, bias, lengths)
    return layers.norm("rmsnorm", self.layer_norm_epsilon, self.dtype, "norm")(x)
