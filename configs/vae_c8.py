"""The VAE with 8 latent channels on ImageNet, 256 px: otherwise vae_c16.py.

  python -m flextok_jax.train --config=configs/vae_c8.py --workdir=DIR

A tokenizer over it needs --config.vae.latent_channels=8 and --config.vae.scaling_factor=0 besides --config.init_from.
"""

from configs import vae_c16


def get_config():
  c = vae_c16.get_config()
  c.vae.latent_channels = 8
  return c
