"""The rectified-flow decoder: noised latents, time and codes to a velocity."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.transformer import AdaLN, PatchTransformer
from flextok_jax.ops import nested, posemb

NULL_CONDITIONS = ("learned", "single", "zero")


class TimeEmbedding(nn.Module):
  """256 sinusoids > Linear > SiLU > Linear."""

  width: int
  dtype: jnp.dtype = jnp.float32
  max_timestep: float = 1.0

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    """t [b] in [0, 1] -> [b, width]."""
    x = posemb.timestep_features(t, time_scale=1000.0 / self.max_timestep)
    x = nn.silu(layers.dense(self.width, (None, "embed"), "in", self.dtype)(x))
    return layers.dense(self.width, ("embed", "embed_out"), "out", self.dtype)(x)


class Decoder(PatchTransformer, kw_only=True):
  """Diffusion transformer with adaLN-zero modulations, of patches and registers apart (FlexTok, section 3.1)."""

  modulation: str = "per_segment"
  head_modulation: bool = True
  head_modulation_bias: bool = True
  code_bias: bool = True
  max_timestep: float = 1.0
  null_condition: str = "learned"

  def setup(self):
    self.time_embed = TimeEmbedding(self.width, self.dtype, self.max_timestep)
    sets = 2 if self.modulation == "per_segment" else 1
    self.adaln = AdaLN(self.depth, sets, self.head_modulation, self.head_modulation_bias, self.dtype)

  def modulations(self, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Returns all that depends on the times t [b] in [0, 1] alone, see AdaLN."""
    return self.adaln(self.time_embed(t))

  @nn.compact
  def __call__(
    self,
    x_t: jax.Array,
    t: jax.Array,
    codes: jax.Array,
    keep_k: jax.Array,
    drop_condition: jax.Array,
    modulations: tuple[jax.Array, jax.Array | None] | None = None,
    tap: int | None = None,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Predicts the velocity noise - x0.

    With fewer slots than registers the masked registers are merged (nested.key_weights): the same function of a shorter
    sequence. There must be more slots than kept registers, unless all are kept.

    Args:
      x_t: noised latents [b, h, w, c].
      t: times [b] in [0, 1].
      codes: FSQ codes [b, slots, code_dim], at most num_registers; those at or past keep_k have no influence.
      keep_k: number of codes to use [b].
      drop_condition: True where no code is used [b].
      modulations: those of t where they are known already, their batch axis b or 1.
      tap: a block, counted from 1.

    Returns:
      [b, h, w, c] float32; with a tap also the patches [b, h/p * w/p, width] as they leave that block.
    """
    chex.assert_shape([t, keep_k, drop_condition], x_t.shape[:1])  # else they would broadcast in silence
    slots = codes.shape[1]
    if slots > self.num_registers:
      raise ValueError(f"{slots} codes are more than the {self.num_registers} registers")
    embed = layers.dense(self.width, (None, "embed"), "code_embed", self.dtype, use_bias=self.code_bias)
    # Comparable to the embedded codes, so that the first LayerNorm keeps their magnitude and not their sign alone.
    init = layers.normal(0.3, "registers", "embed")
    table = self.param("register_positions", init, (self.num_registers, self.width))
    mask_token = self.param("mask_token", layers.normal(0.02, "embed"), (self.width,))
    null = 0.0
    if self.null_condition != "zero":
      null = self.param("null_token", layers.normal(0.02, "embed"), (self.width,)).astype(self.dtype)
    registers = embed(codes) + table[:slots].astype(self.dtype)
    registers = nested.mask_tail(registers, mask_token.astype(self.dtype), keep_k)
    registers = jnp.where(drop_condition[:, None, None], null, registers)

    patches = self.embed_patches(x_t)
    key_bias = None
    single = self.null_condition == "single"
    if single or slots < self.num_registers:
      weights = nested.key_weights(keep_k, drop_condition, slots, self.num_registers, single)
      key_bias = jnp.pad(weights, ((0, 0), (patches.shape[1], 0)))  # [b, l], a patch counts once

    blocks, head = self.modulations(t) if modulations is None else modulations
    patches = self.run_blocks((patches, registers), 0, blocks, key_bias=key_bias, tap=tap)
    patches, tapped = (patches, None) if tap is None else patches

    _, height, width, channels = x_t.shape
    x = self.project(patches, self.patch_size**2 * channels, head)
    x = x.reshape(-1, height // self.patch_size, width // self.patch_size, x.shape[-1])
    velocity = layers.unpatchify(x, self.patch_size).astype(jnp.float32)
    return velocity if tap is None else (velocity, tapped)
