"""The rectified-flow decoder: noised latents, time and codes to a velocity."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.transformer import Transformer
from flextok_jax.ops import nested, posemb


class TimeEmbedding(nn.Module):
  """256 sinusoids > Linear > SiLU > Linear."""

  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    """t [b] in [0, 1] -> [b, width]."""

    def linear(axes, name):
      return nn.Dense(
          self.width,
          dtype=self.dtype,
          kernel_init=layers.xavier_uniform(self.width, axes),
          bias_init=layers.zeros(axes[1]),
          name=name,
      )

    x = nn.silu(linear((None, "embed"), "in")(posemb.timestep_features(t)))
    return linear(("embed", "embed_out"), "out")(x)


class Decoder(nn.Module):
  """Diffusion transformer with separate adaLN-zero modulations for patches and registers (FlexTok, section 3.1)."""

  width: int
  depth: int
  head_dim: int
  patch_size: int
  num_registers: int
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

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
    registers = nn.Dense(
        self.width,
        dtype=self.dtype,
        kernel_init=layers.xavier_uniform(self.width, (None, "embed")),
        bias_init=layers.zeros("embed"),
        name="code_embed",
    )(codes)
    # Comparable to the embedded codes, so that the first LayerNorm keeps their magnitude and not their sign alone.
    init = layers.normal(0.3, "registers", "embed")
    table = self.param("register_positions", init, (self.num_registers, self.width))
    mask_token = self.param("mask_token", layers.normal(0.02, "embed"), (self.width,))
    null_token = self.param("null_token", layers.normal(0.02, "embed"), (self.width,))
    registers = nested.mask_tail(registers + table.astype(self.dtype), mask_token.astype(self.dtype), keep_k)
    registers = jnp.where(drop_condition[:, None, None], null_token.astype(self.dtype), registers)

    channels = x_t.shape[-1]
    x = layers.patchify(x_t, self.patch_size)
    batch, height, width, _ = x.shape
    x = nn.Dense(
        self.width,
        dtype=self.dtype,
        kernel_init=layers.xavier_uniform(self.width, (None, "embed")),
        bias_init=layers.zeros("embed"),
        name="patch_embed",
    )(x)
    x = x + posemb.sincos_2d(height, width, self.width).astype(self.dtype)
    x = x.reshape(batch, height * width, self.width)

    cond = TimeEmbedding(self.width, self.dtype, name="time_embed")(t)
    stack = Transformer(self.depth, self.head_dim, self.dtype, self.remat, name="transformer")
    x, _ = stack((x, registers), cond)

    mod = nn.Dense(
        2 * self.width,
        dtype=self.dtype,
        kernel_init=layers.zeros("embed", "modulation"),
        bias_init=layers.zeros("modulation"),
        name="head_modulation",
    )(nn.silu(cond))
    shift, scale = jnp.split(mod[:, None], 2, -1)
    x = layers.layer_norm(x) * (1 + scale) + shift
    x = nn.Dense(
        self.patch_size**2 * channels,
        dtype=self.dtype,
        kernel_init=layers.zeros("embed", None),
        bias_init=layers.zeros(None),
        name="head",
    )(x)
    x = x.reshape(batch, height, width, -1)
    return layers.unpatchify(x, self.patch_size).astype(jnp.float32)
