"""Encoders of captions for the generator's cross-attention."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.models import layers
from flextok_jax.models.perception.t5 import T5Encoder
from flextok_jax.models.transformer import BlockChoices, Transformer, remat_name
from flextok_jax.ops import attention as attention_lib

ENCODERS = ("t5", "bytes")
BYTES_VOCAB = 257  # the bytes of UTF-8, and the end


class ByteEncoder(nn.Module):
  """A small bidirectional transformer over the bytes of a caption, with the blocks of the tokenizer."""

  width: int
  depth: int
  head_dim: int
  max_length: int  # of the table of positions
  dtype: jnp.dtype = jnp.float32
  attention: str = "auto"
  remat: str = "none"  # a key of transformer.REMATS

  @nn.compact
  def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Encodes texts.

    Args:
      ids: int32 [b, t], t at most max_length; those at or past the length have no influence.
      lengths: int32 [b], at least 1.

    Returns:
      Layer-normed features [b, t, width] of dtype; those at or past the length mean nothing.
    """
    length = ids.shape[1]
    if length > self.max_length:
      raise ValueError(f"a text of {length} bytes is longer than the encoder's {self.max_length}")
    # Bytes and positions weigh alike, and as much as what a block adds.
    embedding = self.param("embedding", layers.normal(0.5, "vocab", "embed"), (BYTES_VOCAB, self.width))
    positions = self.param("positions", layers.normal(0.5, "positions", "embed"), (self.max_length, self.width))
    x = embedding[ids].astype(self.dtype) + positions[:length].astype(self.dtype)
    choices = BlockChoices(
      head_dim=self.head_dim,
      mlp_ratio=4.0,
      gated_mlp=True,
      activation="silu",
      qk_norm=True,
      qkv_bias=False,
      out_bias=False,
      mlp_bias=False,
      dtype=self.dtype,
      attention=self.attention,
    )
    key_bias = attention_lib.padding_bias(lengths, length)
    x = Transformer(self.depth, choices, 0, self.remat, name="transformer")((x,), key_bias=key_bias)
    return layers.layer_norm(x)


def make_text_encoder(config: ConfigDict, sizes: Mapping | None = None) -> nn.Module:
  """Returns the encoder of config.text: module(ids [b, t], lengths [b]) -> [b, t, config.text.features].

  Args:
    config: of stage "ar".
    sizes: of "t5", which the configuration does not hold: as weights/perception/t5.py reads them.

  Raises:
    ValueError: an unknown encoder, or sizes that do not fit together.
  """
  c, dtype = config.text, jnp.dtype(config.dtype)
  if c.encoder == "bytes":
    if c.depth < 1:
      raise ValueError(f"config.text.depth must be at least 1, got {c.depth}")
    if c.head_dim < 1 or c.features < 1 or c.features % c.head_dim:
      raise ValueError(f"config.text.features={c.features} is not a multiple of config.text.head_dim={c.head_dim}")
    how = dtype, config.attention, remat_name(config.remat)
    return ByteEncoder(c.features, c.depth, c.head_dim, c.max_length, *how)
  if c.encoder != "t5":
    raise ValueError(f"unknown config.text.encoder {c.encoder!r}: use one of {', '.join(ENCODERS)}")
  if sizes is None:
    raise ValueError("the sizes of the T5 encoder are needed: those of its config.json")
  if sizes["d_model"] != c.features:
    raise ValueError(
      f"config.text.features={c.features}, but the T5 encoder {c.path} gives {sizes['d_model']}: "
      f"pass --config.text.features={sizes['d_model']}"
    )
  return T5Encoder(**sizes, dtype=dtype)
