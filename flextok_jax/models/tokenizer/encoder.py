"""Latents and learned registers to the vectors that FSQ quantises."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models import layers
from flextok_jax.models.transformer import PatchTransformer


def causal_last_mask(num_patches: int, num_registers: int) -> np.ndarray:
  """[l, l] boolean (query, key): patches see all patches; register i sees all patches and registers <= i."""
  mask = np.tri(num_patches + num_registers, dtype=bool)
  mask[:, :num_patches] = True
  return mask


class Encoder(PatchTransformer, kw_only=True):
  """Transformer encoder with causal registers (FlexTok, section 3.1)."""

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, num_tokens: int | None = None) -> jax.Array:
    """latents [b, h, w, c] -> [b, num_tokens, code_dim] float32; the first num_tokens registers alone are computed."""
    num_tokens = self.num_registers if num_tokens is None else num_tokens
    patches = self.embed_patches(latents)
    batch, num_patches, _ = patches.shape

    # Of the patches' scale: much smaller ones drown in the first block's residual, and all registers become alike.
    init = layers.normal(1.0, "registers", "embed")
    registers = self.param("registers", init, (self.num_registers, self.width))
    registers = jnp.broadcast_to(registers[:num_tokens].astype(self.dtype), (batch, num_tokens, self.width))
    mask = jnp.asarray(causal_last_mask(num_patches, num_tokens))
    x = self.run_blocks((patches, registers), 1, mask=mask)
    # FSQ rounds the outcome, so in float32 whatever dtype is; starting at zero is in the linear part of FSQ's tanh.
    return self.project(x, self.code_dim, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)
