"""REPA (Yu et al. 2024, arXiv 2410.06940) in stage "tokenizer": readers of config.repa."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.models.tokenizer.decoder import Decoder
from flextok_jax.models.tokenizer.repa import Projector


def section(config: ConfigDict) -> ConfigDict | None:
  """Returns config.repa if a run trains with it, else None."""
  repa = config.repa
  return repa if config.stage == "tokenizer" and repa is not None and repa.weight else None


def decoder_grid(config: ConfigDict) -> int:
  """Returns the number of patches of the decoder per side."""
  downscale = 1 if config.vae.kind == "pixels" else 2 ** (len(config.vae.block_out_channels) - 1)
  return config.image_size // downscale // config.decoder.patch_size


def teacher_grid(config: ConfigDict) -> int:
  """Returns the number of patches of the teacher's features per side."""
  return config.repa.grid or decoder_grid(config)


def make_projector(config: ConfigDict, decoder: Decoder) -> Projector | None:
  """Returns the projector of config.repa; None if REPA is off.

  Raises:
    ValueError: the decoder has no such block.
  """
  repa = section(config)
  if repa is None:
    return None
  if repa.block > decoder.depth:
    raise ValueError(f"repa.block {repa.block} is not one of the {decoder.depth} blocks of the decoder, counted from 1")
  return Projector(repa.hidden, repa.features, jnp.dtype(config.dtype))
