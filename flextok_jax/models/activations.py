"""Estimates the memory of activations in training, from which a mesh is chosen before anything is compiled.

All are bytes per row of the batch. docs/scaling.md compares the estimates with what the TPU compiler reports.
"""

from flextok_jax.models.layers import BlockChoices
from flextok_jax.models.vae.autoencoder import AutoencoderKL

_LOGIT_COPIES = 3  # logits, their exponentials and their gradient, float32
_FORWARD_MAPS = 6  # feature maps of the largest size that exist at once in a convolutional network without gradients
_SAVED_MAPS = 10  # feature maps that a residual block of a VAE saves, with those in float32 of its norms
# Feature maps of LPIPS's VGG, as channels at the full resolution: 64 x 2, 128 x 2 / 4, 256 x 3 / 16, 512 x 3 / 64, ...
_VGG_CHANNELS = 270


def saved_by_block(
  c: BlockChoices, remat: str, tokens: float, keys: float, maps: bool = False, text_tokens: int = 0
) -> float:
  """Returns what a block saves for its backward pass.

  Args:
    c: the choices of the block.
    remat: a key of layers.REMATS.
    tokens: of the sequence.
    keys: that each token attends to.
    maps: whether attention writes its logits to memory.
    text_tokens: of a text that the block attends to.
  """
  size, hidden = c.dtype.itemsize, c.mlp_hidden
  saved: float = c.width * size  # the input of the block
  if remat == "full":
    return tokens * saved
  # Outputs of products with weights: queries, keys, values, output of attention, hidden units, output of the MLP.
  saved += (5 * c.width + (2 if c.gated_mlp else 1) * hidden) * size
  text = 0
  if c.cross_attention:
    saved, text = saved + 2 * c.width * size, 2 * c.width * size * text_tokens
  if remat == "none":
    # Norms, residuals and rotated or scaled heads, most of them float32; activations of hidden units; logits and
    # probabilities. The factors are those of the jaxprs of blocks of width 768, within 15%.
    saved += 48 * c.width + 4 * size * hidden + (4 + size) * keys * (c.width // c.head_dim) * maps
  return tokens * saved + text


def of_blocks(
  c: BlockChoices, depth: int, remat: str, tokens: float, keys: float, maps: bool = False, text_tokens: int = 0
) -> tuple[float, float]:
  """Returns what `depth` blocks save, and what the backward pass of one block needs besides; see saved_by_block."""
  shape = tokens, keys, maps, text_tokens
  return depth * saved_by_block(c, remat, *shape), saved_by_block(c, "none", *shape)


def of_logits(positions: int, num_outputs: int) -> float:
  """Returns the logits of a chunk of positions and what the cross-entropy computes of them."""
  return _LOGIT_COPIES * 4.0 * positions * num_outputs


def of_frozen_vae(vae: AutoencoderKL, side: int) -> float:
  """Returns what encoding an image of side x side pixels holds at once."""
  return float(_FORWARD_MAPS * side**2 * vae.block_out_channels[0] * vae.dtype.itemsize)


def of_vae(vae: AutoencoderKL, side: int, lpips: bool) -> float:
  """Returns what encoder and decoder save of an image of side x side pixels, and LPIPS of the reconstruction."""
  size, blocks = vae.dtype.itemsize, 2 * vae.layers_per_block + 1
  maps = sum((side // 2**i) ** 2 * channels for i, channels in enumerate(vae.block_out_channels))
  return float(size * (_SAVED_MAPS * blocks * maps + 4 * _VGG_CHANNELS * side**2 * lpips))
