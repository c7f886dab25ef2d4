"""Tokenizers small enough for tests: their configs, and random parameters of any stage."""

from flax.core import meta
import jax
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.config import derive


def tiny_config(**overrides) -> ConfigDict:
  """A pixel-space tokenizer of 4 registers for 16 px images."""
  part = dict(width=32, depth=1, head_dim=16, patch_size=4)
  settings = dict(
    image_size=16,
    dtype="float32",
    vae=dict(kind="pixels", scaling_factor=1.0),
    encoder=part,
    decoder=part,
    tokens=dict(num_registers=4, levels=(8, 5, 5)),
    sampler=dict(num_steps=2, guidance="none"),
  )
  return derive(**{**settings, **overrides})


VAE = dict(
  kind="autoencoder_kl",
  latent_channels=4,
  block_out_channels=(8, 8),
  layers_per_block=1,
  norm_groups=4,
  scaling_factor=0.5,
)


def latent_config(**overrides) -> ConfigDict:
  """A tokenizer for 16 px images over a VAE with 8 x 8 x 4 latents."""
  part = dict(width=32, depth=1, head_dim=16, patch_size=2)
  return tiny_config(**(dict(vae=VAE, encoder=part, decoder=part) | overrides))


def make_params(stage) -> dict:
  """Random parameters of a stage, of standard deviation 0.2."""
  rng = np.random.default_rng(0)
  params, frozen = meta.unbox(jax.eval_shape(stage.init, jax.random.key(0)))
  return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), {**params, **frozen})
