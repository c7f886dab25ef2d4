"""The VAE with 4 latent channels on ImageNet, 256 px: otherwise vae_c16.py.

  python -m flextok_jax.train --config=configs/vae_c4.py --workdir=DIR

A tokenizer over it needs --config.vae.latent_channels=4 and --config.vae.scaling_factor=0 besides --config.init_from.
"""

from configs import vae_c16


def get_config():
  c = vae_c16.get_config()
  c.vae.latent_channels = 4
  return c
