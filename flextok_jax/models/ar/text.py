"""The text encoder that is trained jointly with a generator."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.transformer import Stream, Transformer, mlp_hidden
from flextok_jax.ops import attention as attention_lib
from flextok_jax.ops import norms

BYTES_VOCAB = 257  # the bytes of UTF-8, and the end
NGRAMS = (3, 4, 5, 6)


def ngram_rows(ids: jax.Array, length: int, rows: int) -> jax.Array:
  """Returns a row int32 [b, t] of a table for the `length` ids that end at each position of ids [b, t], by a hash."""
  state = jnp.full(ids.shape, length, jnp.uint32)
  for back in range(length):
    shifted = jnp.pad(ids, ((0, 0), (back, 0)))[:, : ids.shape[1]]
    state = (state ^ shifted.astype(jnp.uint32)) * jnp.uint32(0x01000193)  # FNV-1
  state ^= state >> 15  # the low bits depend on low bits alone so far
  return (state * jnp.uint32(0x2C1B3C6D) >> 8).astype(jnp.int32) % rows


class ByteEncoder(nn.Module):
  """A small bidirectional transformer over the bytes of a caption, with the blocks of the tokenizer.

  With `ngram_rows`, a byte also has the embeddings of the n-grams that end there, of a table by hash, so that words
  need not be learnt from bytes [Pagnoni et al. 2024, arXiv 2412.09871].
  """

  width: int
  depth: int
  head_dim: int
  max_length: int  # of the table of positions
  ngram_rows: int = 0  # of the table of n-grams; 0: none
  dtype: jnp.dtype = jnp.float32
  attention: str = "auto"
  remat: str = "none"  # a key of layers.REMATS

  @nn.compact
  def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Encodes texts.

    Args:
      ids: int32 [b, t], t at most max_length; those at or past the length have no effect.
      lengths: int32 [b], at least 1.

    Returns:
      Layer-normed features [b, t, width] of dtype; those at or past the length are meaningless.
    """
    length = ids.shape[1]
    if length > self.max_length:
      raise ValueError(f"a text of {length} bytes is longer than the encoder's {self.max_length}")
    # Initialised at the same scale as each other and as the output of a block. [b, t] -> [b, t, width]
    embedding = self.param("embedding", layers.normal(0.5, "vocab", "embed"), (BYTES_VOCAB, self.width))
    positions = self.param("positions", layers.normal(0.5, "positions", "embed"), (self.max_length, self.width))
    x = embedding[ids].astype(self.dtype) + positions[:length].astype(self.dtype)
    if self.ngram_rows:
      table = self.param("ngrams", layers.normal(0.5, "vocab", "embed"), (self.ngram_rows, self.width))
      rows = jnp.stack([ngram_rows(ids, length, self.ngram_rows) for length in NGRAMS])  # [n, b, t]
      x += table[rows].mean(0).astype(self.dtype)
    choices = layers.BlockChoices(
      width=self.width,
      head_dim=self.head_dim,
      mlp_hidden=mlp_hidden(self.width, ratio=4.0, gated=True),
      logit_scale=8 / self.head_dim,
      gated_mlp=True,
      activation="silu",
      qk_norm="unscaled",
      dtype=self.dtype,
      attention=self.attention,
    )
    key_bias = attention_lib.padding_bias(lengths, length)
    blocks = Transformer(self.depth, choices, 0, self.remat, name="transformer")
    ((x, _),) = blocks([Stream((x,), key_bias=key_bias)])
    return norms.layer_norm(x)
