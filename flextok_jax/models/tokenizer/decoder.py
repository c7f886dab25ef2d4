"""The rectified-flow decoder: noised latents, time and codes to a velocity."""

from collections.abc import Sequence
import math
from typing import NamedTuple

import chex
from einops import repeat
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.transformer import AdaLN, PatchTransformer, Stream
from flextok_jax.ops import fsq, nested, posemb


class TimeEmbedding(nn.Module):
  """256 sinusoids > Linear > SiLU > Linear."""

  width: int
  dtype: jnp.dtype = jnp.float32
  max_timestep: float = 1.0
  zero: bool = False  # initial output

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    """t [b] in [0, 1] -> [b, width]."""
    x = posemb.timestep_features(t, time_scale=1000.0 / self.max_timestep)
    x = nn.silu(layers.dense(self.width, (None, "embed"), "in", self.dtype)(x))
    return layers.dense(self.width, ("embed", "embed_out"), "out", self.dtype, zero=self.zero)(x)


class Inputs(NamedTuple):
  """A batch of inputs of the decoder.

  Attributes:
    x_t: noised latents [b, h, w, c].
    t: times [b] in [0, 1].
    codes: FSQ codes [b, n, code_dim], n at most num_registers; codes at or past keep_k have no effect.
    keep_k: number of codes to use [b].
    drop_condition: True where no code is used [b].
    modulations: what Decoder.modulations(t) returns, with batch axis b or 1; None: computed by the decoder.
    interval: of a student, see Decoder.modulations; without effect if these are given.
  """

  x_t: jax.Array
  t: jax.Array
  codes: jax.Array
  keep_k: jax.Array
  drop_condition: jax.Array
  modulations: tuple[jax.Array, jax.Array | None] | None = None
  interval: jax.Array | None = None


class Decoder(PatchTransformer, kw_only=True):
  """Diffusion transformer with adaLN-zero modulation (FlexTok, section 3.1).

  The codes become registers beside the patches. With layout "grid" each code is added to the patches at its place.
  """

  modulation: str = "per_segment"
  head_modulation: bool = True
  head_modulation_bias: bool = True
  code_bias: bool = True
  max_timestep: float = 1.0
  null_condition: str = "learned"
  interval: bool = False
  mask: str = "token"

  def setup(self) -> None:
    self.time_embed = TimeEmbedding(self.width, self.dtype, self.max_timestep)
    if self.interval:
      self.interval_embed = TimeEmbedding(self.width, self.dtype, self.max_timestep, zero=True)
    sets = 2 if self.modulation == "per_segment" else 1
    self.adaln = AdaLN(self.depth, sets, self.head_modulation, self.head_modulation_bias, self.dtype)

  def modulations(self, t: jax.Array, interval: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """Returns everything that depends only on the times t [b] in [0, 1] and, of a student, on the intervals: see AdaLN.

    Args:
      t: times [b].
      interval: of a student, lengths t - r [b] of the intervals from t to r over which its velocities are means; None:
        0.
    """
    embedded = self.time_embed(t)
    if self.interval:
      embedded = embedded + self.interval_embed(jnp.zeros_like(t) if interval is None else interval)
    return self.adaln(embedded)

  @nn.compact
  def __call__(
    self, batches: Sequence[Inputs], feature_block: int | None = None
  ) -> list[tuple[jax.Array, jax.Array | None]]:
    """Predicts the velocity noise - x0; a student predicts its mean over the path from t to t - interval.

    With fewer codes than registers, masked registers are merged (nested.key_log_counts): the same function of a shorter
    sequence. There must be more codes than kept registers, unless all are kept, or masked ones are hidden from the
    attention (`mask` "attention"). A grid is completed with id 0.

    Args:
      batches: all pass a block before the next one.
      feature_block: number of a block, from 1, after which the patches are returned as well.

    Returns:
      Of each batch, the velocity [b, h, w, c] float32, and the patches [b, h/p * w/p, width] after the feature_block
      (None without one).

    Raises:
      ValueError: there are more codes than registers, or no such block.
    """
    for x in batches:
      # Else they would be broadcast silently.
      chex.assert_shape([x.t, x.keep_k, x.drop_condition], x.x_t.shape[:1])
      if x.codes.shape[1] > self.num_registers:
        raise ValueError(f"{x.codes.shape[1]} codes are more than the {self.num_registers} registers")

    # [b, h, w, c] -> [b, h/p * w/p, width]
    patches = self.embed_patches([x.x_t for x in batches])
    tokens = self._embed_grids(batches, patches) if self.layout == "grid" else self._embed_registers(batches)
    modulations = [self.modulations(x.t, x.interval) if x.modulations is None else x.modulations for x in batches]
    streams = []
    for x, image, added, (modulation, _) in zip(batches, patches, tokens, modulations, strict=True):
      if self.layout == "grid":
        streams.append(Stream((image + added,), modulation))
      else:
        streams.append(Stream((image, added), modulation, key_bias=self._key_bias(x, image.shape[1])))
    outputs = self.run_blocks(streams, 0, feature_block)

    # [b, h/p * w/p, width] -> [b, h/p * w/p, p * p * c] -> [b, h, w, c]
    channels, p = batches[0].x_t.shape[-1], self.patch_size
    projected = self.project([x for x, _ in outputs], p**2 * channels, [head for _, head in modulations])
    velocities = []
    for x, v in zip(batches, projected, strict=True):
      v = v.reshape(v.shape[0], x.x_t.shape[1] // p, x.x_t.shape[2] // p, -1)
      velocities.append(layers.unpatchify(v, p).astype(jnp.float32))
    return [(v, features) for v, (_, features) in zip(velocities, outputs, strict=True)]

  def _key_bias(self, x: Inputs, num_patches: int) -> jax.Array | None:
    """Returns the bias of the keys [b, num_patches + n]: a merged register counts as many keys, a hidden one none."""
    num_codes, single, hide = x.codes.shape[1], self.null_condition == "single", self.mask == "attention"
    if not (single or hide) and num_codes == self.num_registers:
      return None
    log_counts = nested.key_log_counts(x.keep_k, x.drop_condition, num_codes, self.num_registers, single, hide)
    return jnp.pad(log_counts, ((0, 0), (num_patches, 0)))

  def _embed_registers(self, batches: Sequence[Inputs]) -> list[jax.Array]:
    """Returns registers [b, n, width]: codes and positions; mask tokens past keep_k; null tokens without condition."""
    # Comparable to the embedded codes, so that the first LayerNorm keeps their magnitude, not only their sign.
    init = layers.normal(0.3, "registers", "embed")
    table = self.param("register_positions", init, (self.num_registers, self.width)).astype(self.dtype)
    mask_token = self.param("mask_token", layers.normal(0.02, "embed"), (self.width,)).astype(self.dtype)
    embed, null = self._code_embed(), self._null()
    registers = [nested.mask_tail(embed(x.codes) + table[: x.codes.shape[1]], mask_token, x.keep_k) for x in batches]
    return [jnp.where(x.drop_condition[:, None, None], null, y) for x, y in zip(batches, registers, strict=True)]

  def _embed_grids(self, batches: Sequence[Inputs], patches: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns what is added to the patches [b, l, width]: codes, of id 0 past keep_k; null without condition."""
    embed, null = self._code_embed(), self._null()
    side, added = math.isqrt(self.num_registers), []
    for x, image in zip(batches, patches, strict=True):
      kept = jnp.arange(x.codes.shape[1], dtype=jnp.int32) < x.keep_k[:, None]
      codes = jnp.where(kept[:, :, None], x.codes, fsq.FIRST_CODE)
      missing = self.num_registers - codes.shape[1]
      codes = jnp.pad(codes, ((0, 0), (0, missing), (0, 0)), constant_values=fsq.FIRST_CODE)
      tokens = jnp.where(x.drop_condition[:, None, None], null, embed(codes))
      p = math.isqrt(image.shape[1]) // side  # patches per token and axis
      # [b, num_registers, width] -> [b, l, width]
      added.append(repeat(tokens, "b (h w) d -> b (h p w q) d", h=side, p=p, q=p))
    return added

  def _code_embed(self) -> nn.Module:
    """Returns the layer [b, n, code_dim] -> [b, n, width]."""
    return layers.dense(self.width, (None, "embed"), "code_embed", self.dtype, use_bias=self.code_bias)

  def _null(self) -> jax.Array:
    """Returns the vector that replaces every code without a condition: [width], or 0."""
    if self.null_condition == "zero":
      return jnp.zeros((), self.dtype)
    return self.param("null_token", layers.normal(0.02, "embed"), (self.width,)).astype(self.dtype)
