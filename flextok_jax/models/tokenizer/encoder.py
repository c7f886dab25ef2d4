"""The encoder: latents to the vectors that FSQ quantises, one for each register, or of a grid for each patch."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models import layers
from flextok_jax.models.transformer import PatchTransformer, Stream


def causal_last_mask(num_patches: int, num_registers: int) -> np.ndarray:
  """[l, l] boolean (query, key): patches attend to all patches, register i to all patches and registers <= i."""
  mask = np.tri(num_patches + num_registers, dtype=bool)
  mask[:, :num_patches] = True
  return mask


class Encoder(PatchTransformer, kw_only=True):
  """Transformer encoder with causal registers (FlexTok, section 3.1); with layout "grid" without any."""

  code_dim: int

  @nn.compact
  def __call__(self, batches: Sequence[tuple[jax.Array, int | None]], features: str | None = None) -> list[jax.Array]:
    """Encodes batches of latents, all of which pass a block before the next one.

    Args:
      batches: (latents [b, h, w, c], how many of the first tokens to compute; None: all) each.
      features: "registers" or "patches" to return these as the last block leaves them; None: apply the head.

    Returns:
      Of each batch, vectors of the tokens [b, num_tokens, code_dim] float32; with features [b, num_tokens or patches,
      width].
    """
    patches = self.embed_patches([latents for latents, _ in batches])
    lengths = [self.num_registers if length is None else length for _, length in batches]
    if features == "patches" or self.layout == "grid":  # patches attend to each other alone
      xs = [x for x, _ in self.run_blocks([Stream((x,)) for x in patches], 0)]
      if features == "patches":
        return xs
      xs = [x[:, :length] for x, length in zip(xs, lengths, strict=True)]
    else:
      # At the scale of the patches: if much smaller, the residual of the first block dominates, and all registers
      # become alike.
      init = layers.normal(1.0, "registers", "embed")
      registers = self.param("registers", init, (self.num_registers, self.width)).astype(self.dtype)
      streams = []
      for x, length in zip(patches, lengths, strict=True):
        # [num_registers, width] -> [b, length, width]
        tokens = jnp.broadcast_to(registers[:length], (x.shape[0], length, self.width))
        streams.append(Stream((x, tokens), mask=jnp.asarray(causal_last_mask(x.shape[1], length))))
      xs = [x for x, _ in self.run_blocks(streams, 1)]
    if features == "registers":
      return xs
    # In float32 for every dtype, as FSQ rounds it. The kernel starts at zero, in the linear part of the tanh of FSQ.
    return self.project(xs, self.code_dim, [None] * len(xs), dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)
