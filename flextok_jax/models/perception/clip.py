"""CLIP (Radford et al. 2021): images and texts as vectors of one space.

Its parameters are meant to be loaded (weights/perception/clip.py); token ids come from CLIPTokenizer of data/text.py.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.perception import vit
from flextok_jax.models.perception.vit import ViT

# Mean and standard deviation of red, green and blue.
NORMALISATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: jax.Array, size: int = 224) -> jax.Array:
  """Resizes, crops and normalises images [b, h, w, 3] in [0, 1]: float32 [b, size, size, 3]; see vit.preprocess."""
  return vit.preprocess(images, size, size, *NORMALISATION)


class TextTower(nn.Module, kw_only=True):
  """Token ids to one vector: the output of a causal transformer at the last token."""

  vocab_size: int
  max_length: int  # of the table of positions
  width: int
  depth: int
  head_dim: int
  mlp_hidden: int
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype = jnp.float32
  attention: str = "auto"

  @nn.compact
  def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """ids int32 [b, t], t at most max_length, lengths int32 [b], start and end included -> [b, width] of dtype."""
    length = ids.shape[1]
    if length > self.max_length:
      raise ValueError(f"a text of {length} tokens is longer than CLIP's {self.max_length}")
    table = self.param("embedding", layers.normal(0.02, "vocab", "embed"), (self.vocab_size, self.width))
    positions = self.param("positions", layers.normal(0.01, None, "embed"), (self.max_length, self.width))
    x = table[ids].astype(jnp.float32) + positions[:length].astype(jnp.float32)
    choices = layers.BlockChoices(
      width=self.width,
      head_dim=self.head_dim,
      mlp_hidden=self.mlp_hidden,
      logit_scale=self.head_dim**-0.5,
      gated_mlp=False,
      activation=self.activation,
      norm_eps=self.norm_epsilon,
      qkv_bias=True,
      out_bias=True,
      mlp_bias=True,
      dtype=self.dtype,
      attention=self.attention,
    )
    x = vit.run_blocks(x, jnp.tri(length, dtype=bool), self.depth, choices)
    # [b, t, width] -> [b, width]: the last token of each text
    x = jnp.take_along_axis(x, lengths[:, None, None] - 1, 1)[:, 0]
    return layers.norm("layernorm", self.norm_epsilon, self.dtype, "norm")(x)


class CLIP(nn.Module):
  """The two towers and their projections to unit vectors, whose dot products are cosines."""

  image: Mapping[str, Any]  # fields of ViT, dtype and attention aside
  text: Mapping[str, Any]  # those of TextTower
  features: int
  dtype: jnp.dtype = jnp.float32
  attention: str = "auto"

  def setup(self) -> None:
    self.image_tower = ViT(**self.image, dtype=self.dtype, attention=self.attention)
    self.text_tower = TextTower(**self.text, dtype=self.dtype, attention=self.attention)
    dense = lambda: layers.dense(self.features, ("embed", None), None, self.dtype, use_bias=False)
    self.image_projection, self.text_projection = dense(), dense()

  def image_features(self, images: jax.Array) -> jax.Array:
    """Images [b, h, w, 3] as preprocess returns them -> float32 [b, features] of length 1."""
    return _unit(self.image_projection(self.image_tower(images)["cls"]))

  def text_features(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Token ids int32 [b, t] and their lengths int32 [b] -> float32 [b, features] of length 1."""
    return _unit(self.text_projection(self.text_tower(ids, lengths)))

  def __call__(self, images: jax.Array, ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (image_features, text_features)."""
    return self.image_features(images), self.text_features(ids, lengths)


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
