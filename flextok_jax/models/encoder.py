"""Latents and learned registers to the vectors that FSQ quantises."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models import layers
from flextok_jax.models.transformer import Transformer
from flextok_jax.ops import posemb


def causal_last_mask(num_patches: int, num_registers: int) -> np.ndarray:
  """[l, l] boolean (query, key): patches see all patches; register i sees all patches and registers <= i."""
  mask = np.tri(num_patches + num_registers, dtype=bool)
  mask[:, :num_patches] = True
  return mask


class Encoder(nn.Module):
  """Transformer encoder with causal registers (FlexTok, section 3.1)."""

  width: int
  depth: int
  head_dim: int
  patch_size: int
  num_registers: int
  code_dim: int
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, latents: jax.Array, num_tokens: int | None = None) -> jax.Array:
    """latents [b, h, w, c] -> [b, num_tokens, code_dim] float32; the first num_tokens registers alone are computed."""
    num_tokens = self.num_registers if num_tokens is None else num_tokens
    x = layers.patchify(latents, self.patch_size)
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

    # Of the patches' scale: much smaller ones drown in the first block's residual, and all registers become alike.
    init = layers.normal(1.0, "registers", "embed")
    registers = self.param("registers", init, (self.num_registers, self.width))
    registers = jnp.broadcast_to(registers[:num_tokens].astype(self.dtype), (batch, num_tokens, self.width))
    x = jnp.concatenate([x, registers], 1)
    mask = jnp.asarray(causal_last_mask(height * width, num_tokens))
    (x,) = Transformer(self.depth, self.head_dim, self.dtype, self.remat, name="transformer")((x,), mask=mask)

    x = layers.layer_norm(x[:, height * width :])
    x = nn.Dense(
        self.code_dim,
        dtype=self.dtype,
        kernel_init=layers.zeros("embed", None),  # starts in the linear part of FSQ's tanh
        bias_init=layers.zeros(None),
        name="head",
    )(x)
    return x.astype(jnp.float32)
