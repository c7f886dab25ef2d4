"""The rectified-flow decoder: noised latents, time and codes to a velocity."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.attention import UNSEEN
from flextok_jax.models.transformer import PatchTransformer
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

  @nn.compact
  def __call__(
      self,
      x_t: jax.Array,
      t: jax.Array,
      codes: jax.Array,
      keep_k: jax.Array,
      drop_condition: jax.Array,
  ) -> jax.Array:
    """Predicts the velocity noise - x0.

    Args:
      x_t: noised latents [b, h, w, c].
      t: times [b] in [0, 1].
      codes: FSQ codes [b, num_registers, code_dim]; those at or past keep_k have no influence.
      keep_k: number of codes to use [b].
      drop_condition: True where no code is used [b].

    Returns:
      [b, h, w, c] float32.
    """
    chex.assert_shape([t, keep_k, drop_condition], x_t.shape[:1])  # else they would broadcast in silence
    chex.assert_axis_dimension(codes, 1, self.num_registers)
    embed = layers.dense(self.width, (None, "embed"), "code_embed", self.dtype, use_bias=self.code_bias)
    # Comparable to the embedded codes, so that the first LayerNorm keeps their magnitude and not their sign alone.
    init = layers.normal(0.3, "registers", "embed")
    table = self.param("register_positions", init, (self.num_registers, self.width))
    mask_token = self.param("mask_token", layers.normal(0.02, "embed"), (self.width,))
    null = 0.0
    if self.null_condition != "zero":
      null = self.param("null_token", layers.normal(0.02, "embed"), (self.width,)).astype(self.dtype)
    registers = embed(codes) + table.astype(self.dtype)
    registers = nested.mask_tail(registers, mask_token.astype(self.dtype), keep_k)
    registers = jnp.where(drop_condition[:, None, None], null, registers)

    patches = self.embed_patches(x_t)
    key_bias = None
    if self.null_condition == "single":  # the first null token alone is seen: as if there were no other
      first = patches.shape[1]
      place = jnp.arange(first + self.num_registers)
      key_bias = jnp.where(drop_condition[:, None] & (place > first), UNSEEN, 0.0)  # [b, l]

    cond = TimeEmbedding(self.width, self.dtype, self.max_timestep, name="time_embed")(t)
    patches, _ = self.make_stack()((patches, registers), cond, key_bias=key_bias)

    _, height, width, channels = x_t.shape
    head = self.make_head(
        self.patch_size**2 * channels,
        dtype=self.dtype,
        modulated=self.head_modulation,
        modulation_bias=self.head_modulation_bias,
    )
    x = head(patches, cond)
    x = x.reshape(-1, height // self.patch_size, width // self.patch_size, x.shape[-1])
    return layers.unpatchify(x, self.patch_size).astype(jnp.float32)
