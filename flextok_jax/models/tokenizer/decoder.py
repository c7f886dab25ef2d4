"""The rectified-flow decoder: noised latents, time and codes to a velocity."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.transformer import AdaLN, PatchTransformer
from flextok_jax.ops import nested, posemb


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


class Decoder(PatchTransformer, kw_only=True):
  """Diffusion transformer with adaLN-zero modulation of patches and registers (FlexTok, section 3.1)."""

  modulation: str = "per_segment"
  head_modulation: bool = True
  head_modulation_bias: bool = True
  code_bias: bool = True
  max_timestep: float = 1.0
  null_condition: str = "learned"
  interval: bool = False

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
    self,
    x_t: jax.Array,
    t: jax.Array,
    codes: jax.Array,
    keep_k: jax.Array,
    drop_condition: jax.Array,
    modulations: tuple[jax.Array, jax.Array | None] | None = None,
    feature_block: int | None = None,
    interval: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Predicts the velocity noise - x0; a student predicts its mean over the path from t to t - interval.

    With fewer codes than registers, masked registers are merged (nested.key_log_counts): the same function of a shorter
    sequence. There must be more codes than kept registers, unless all are kept.

    Args:
      x_t: noised latents [b, h, w, c].
      t: times [b] in [0, 1].
      codes: FSQ codes [b, n, code_dim], n at most num_registers; codes at or past keep_k have no effect.
      keep_k: number of codes to use [b].
      drop_condition: True where no code is used [b].
      modulations: what modulations(t) returns, with batch axis b or 1; None: computed here.
      feature_block: number of a block, from 1, after which the patches are returned as well.
      interval: of a student, see modulations; without effect if these are given.

    Returns:
      velocity [b, h, w, c] float32, and the patches [b, h/p * w/p, width] after the feature_block (None without one).

    Raises:
      ValueError: there are more codes than registers, or no such block.
    """
    chex.assert_shape([t, keep_k, drop_condition], x_t.shape[:1])  # else they would be broadcast silently
    num_codes = codes.shape[1]
    if num_codes > self.num_registers:
      raise ValueError(f"{num_codes} codes are more than the {self.num_registers} registers")

    # Registers: codes and positions; mask tokens past keep_k; null tokens without a condition.
    embed = layers.dense(self.width, (None, "embed"), "code_embed", self.dtype, use_bias=self.code_bias)
    # Comparable to the embedded codes, so that the first LayerNorm keeps their magnitude, not only their sign.
    init = layers.normal(0.3, "registers", "embed")
    table = self.param("register_positions", init, (self.num_registers, self.width))
    mask_token = self.param("mask_token", layers.normal(0.02, "embed"), (self.width,))
    null = jnp.zeros((), self.dtype)
    if self.null_condition != "zero":
      null = self.param("null_token", layers.normal(0.02, "embed"), (self.width,)).astype(self.dtype)
    # [b, n, code_dim] -> [b, n, width]
    registers = embed(codes) + table[:num_codes].astype(self.dtype)
    registers = nested.mask_tail(registers, mask_token.astype(self.dtype), keep_k)
    registers = jnp.where(drop_condition[:, None, None], null, registers)

    # [b, h, w, c] -> [b, h/p * w/p, width]
    patches = self.embed_patches(x_t)

    # A merged register counts as many keys of attention, a patch as one.
    key_bias = None
    single = self.null_condition == "single"
    if single or num_codes < self.num_registers:
      log_counts = nested.key_log_counts(keep_k, drop_condition, num_codes, self.num_registers, single)
      key_bias = jnp.pad(log_counts, ((0, 0), (patches.shape[1], 0)))  # [b, h/p * w/p + n]

    block_modulation, head_modulation = self.modulations(t, interval) if modulations is None else modulations
    segments = patches, registers
    patches, features = self.run_blocks(segments, 0, block_modulation, key_bias=key_bias, feature_block=feature_block)

    # [b, h/p * w/p, width] -> [b, h/p * w/p, p * p * c] -> [b, h, w, c]
    _, height, width, channels = x_t.shape
    x = self.project(patches, self.patch_size**2 * channels, head_modulation)
    x = x.reshape(-1, height // self.patch_size, width // self.patch_size, x.shape[-1])
    return layers.unpatchify(x, self.patch_size).astype(jnp.float32), features
