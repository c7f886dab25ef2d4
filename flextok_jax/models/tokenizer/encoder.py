"""The encoder: latents to the vectors that FSQ quantises, one for each register, or of a grid for each patch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models import layers
from flextok_jax.models.transformer import PatchTransformer


def causal_last_mask(num_patches: int, num_registers: int) -> np.ndarray:
  """[l, l] boolean (query, key): patches attend to all patches, register i to all patches and registers <= i."""
  mask = np.tri(num_patches + num_registers, dtype=bool)
  mask[:, :num_patches] = True
  return mask


class Encoder(PatchTransformer, kw_only=True):
  """Transformer encoder with causal registers (FlexTok, section 3.1); with layout "grid" without any."""

  code_dim: int

  @nn.compact
  def __call__(self, latents: jax.Array, num_tokens: int | None = None, features: str | None = None) -> jax.Array:
    """Encodes latents.

    Args:
      latents: [b, h, w, c].
      num_tokens: how many of the first tokens; None: all.
      features: "registers" or "patches" to return these as the last block leaves them; None: apply the head.

    Returns:
      Vectors of the tokens [b, num_tokens, code_dim] float32; with features [b, num_tokens or patches, width].
    """
    num_tokens = self.num_registers if num_tokens is None else num_tokens
    patches = self.embed_patches(latents)
    batch, num_patches, _ = patches.shape
    if features == "patches":  # which attend to each other alone
      return self.run_blocks((patches,), 0)[0]
    if self.layout == "grid":
      x, _ = self.run_blocks((patches,), 0)
      x = x[:, :num_tokens]
    else:
      # At the scale of the patches: if much smaller, the residual of the first block dominates, and all registers
      # become alike.
      init = layers.normal(1.0, "registers", "embed")
      registers = self.param("registers", init, (self.num_registers, self.width))
      # [num_registers, width] -> [b, num_tokens, width]
      registers = jnp.broadcast_to(registers[:num_tokens].astype(self.dtype), (batch, num_tokens, self.width))
      mask = jnp.asarray(causal_last_mask(num_patches, num_tokens))
      x, _ = self.run_blocks((patches, registers), 1, mask=mask)
    if features == "registers":
      return x
    # In float32 for every dtype, as FSQ rounds it. The kernel starts at zero, in the linear part of the tanh of FSQ.
    return self.project(x, self.code_dim, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)
