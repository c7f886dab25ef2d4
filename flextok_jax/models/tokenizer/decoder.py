"""The rectified-flow decoder: noised latents, time and codes to a velocity."""

import math

import chex
from einops import repeat
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.transformer import AdaLN, PatchTransformer
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
    sequence. There must be more codes than kept registers, unless all are kept, or masked ones are hidden from the
    attention (`mask` "attention"). A grid is completed with id 0.

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

    # [b, h, w, c] -> [b, h/p * w/p, width]
    patches = self.embed_patches(x_t)
    key_bias = None
    segments: tuple[jax.Array, ...]
    if self.layout == "grid":
      segments = (patches + self._embed_grid(codes, keep_k, drop_condition, patches.shape[1]),)
    else:
      segments = patches, self._embed_registers(codes, keep_k, drop_condition)
      # A merged register counts as many keys of attention, a patch as one, a hidden register as none.
      single, hide = self.null_condition == "single", self.mask == "attention"
      if single or hide or num_codes < self.num_registers:
        log_counts = nested.key_log_counts(keep_k, drop_condition, num_codes, self.num_registers, single, hide)
        key_bias = jnp.pad(log_counts, ((0, 0), (patches.shape[1], 0)))  # [b, h/p * w/p + n]

    block_modulation, head_modulation = self.modulations(t, interval) if modulations is None else modulations
    patches, features = self.run_blocks(segments, 0, block_modulation, key_bias=key_bias, feature_block=feature_block)

    # [b, h/p * w/p, width] -> [b, h/p * w/p, p * p * c] -> [b, h, w, c]
    _, height, width, channels = x_t.shape
    x = self.project(patches, self.patch_size**2 * channels, head_modulation)
    x = x.reshape(-1, height // self.patch_size, width // self.patch_size, x.shape[-1])
    return layers.unpatchify(x, self.patch_size).astype(jnp.float32), features

  def _embed_registers(self, codes: jax.Array, keep_k: jax.Array, drop: jax.Array) -> jax.Array:
    """Returns registers [b, n, width]: codes and positions; mask tokens past keep_k; null tokens where `drop`."""
    # Comparable to the embedded codes, so that the first LayerNorm keeps their magnitude, not only their sign.
    init = layers.normal(0.3, "registers", "embed")
    table = self.param("register_positions", init, (self.num_registers, self.width))
    mask_token = self.param("mask_token", layers.normal(0.02, "embed"), (self.width,))
    registers = self._embed_codes(codes) + table[: codes.shape[1]].astype(self.dtype)
    registers = nested.mask_tail(registers, mask_token.astype(self.dtype), keep_k)
    return jnp.where(drop[:, None, None], self._null(), registers)

  def _embed_grid(self, codes: jax.Array, keep_k: jax.Array, drop: jax.Array, num_patches: int) -> jax.Array:
    """Returns what is added to the patches [b, num_patches, width]: codes, of id 0 past keep_k; null where `drop`."""
    kept = jnp.arange(codes.shape[1], dtype=jnp.int32) < keep_k[:, None]
    codes = jnp.where(kept[:, :, None], codes, fsq.FIRST_CODE)
    missing = self.num_registers - codes.shape[1]
    codes = jnp.pad(codes, ((0, 0), (0, missing), (0, 0)), constant_values=fsq.FIRST_CODE)
    tokens = jnp.where(drop[:, None, None], self._null(), self._embed_codes(codes))
    side = math.isqrt(self.num_registers)
    patches = math.isqrt(num_patches) // side  # per token and axis
    # [b, num_registers, width] -> [b, num_patches, width]
    return repeat(tokens, "b (h w) d -> b (h p w q) d", h=side, p=patches, q=patches)

  def _embed_codes(self, codes: jax.Array) -> jax.Array:
    """[b, n, code_dim] -> [b, n, width]."""
    return layers.dense(self.width, (None, "embed"), "code_embed", self.dtype, use_bias=self.code_bias)(codes)

  def _null(self) -> jax.Array:
    """Returns the vector that replaces every code without a condition: [width], or 0."""
    if self.null_condition == "zero":
      return jnp.zeros((), self.dtype)
    return self.param("null_token", layers.normal(0.02, "embed"), (self.width,)).astype(self.dtype)
