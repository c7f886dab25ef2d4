"""Stage 0: the autoencoder, by reconstruction and KL losses."""

import functools

import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax import settings
from flextok_jax.models.flextok import to_float
from flextok_jax.models.vae import AutoencoderKL, kl_divergence, sample_posterior
from flextok_jax.stages.stage import Stage


def make_vae(config: ConfigDict) -> AutoencoderKL:
  """Builds the autoencoder from config.vae.

  Raises:
    ValueError: when the image size does not fit it.
  """
  c = config.vae
  dtype = c.get("dtype", config.dtype)  # weights files from before vae.dtype was a field: the VAE had the model's
  vae = AutoencoderKL(
      latent_channels=c.latent_channels,
      block_out_channels=tuple(c.block_out_channels),
      layers_per_block=c.layers_per_block,
      norm_groups=c.norm_groups,
      dtype=settings.float_dtype("vae.dtype", dtype),
  )
  if config.image_size % vae.downscale:
    raise ValueError(f"image_size {config.image_size} is not a multiple of the VAE's downscale {vae.downscale}")
  return vae


class VAEStage(Stage):
  """Trains AutoencoderKL: parameters {"vae": ...}, nothing frozen."""

  def __init__(self, config: ConfigDict):
    if config.vae.kind != "autoencoder_kl":
      raise ValueError(f"stage 'vae' trains vae.kind 'autoencoder_kl', got {config.vae.kind!r}")
    self.loss_weights = config.vae_loss
    self.image_size = config.image_size
    self.vae = make_vae(config)

  def init(self, key):
    images = jnp.zeros((1, self.image_size, self.image_size, 3))
    return {"vae": self.vae.init(key, images)["params"]}, {}

  def loss_fn(self, params, batch, key, step):
    """Weighted L1 + L2 over pixels + KL of the posterior (summed over a latent, averaged over the batch)."""
    del step
    apply = functools.partial(self.vae.apply, {"params": params["vae"]})
    images = to_float(batch["image"])
    mean, logvar = apply(images, method="encode")
    recon = apply(sample_posterior(mean, logvar, key), method="decode").astype(jnp.float32)
    l1 = jnp.abs(recon - images).mean((1, 2, 3))
    l2 = jnp.square(recon - images).mean((1, 2, 3))
    kl = kl_divergence(mean, logvar)
    w = self.loss_weights
    per_sample = w.l1_weight * l1 + w.l2_weight * l2 + w.kl_weight * kl
    named = dict(loss=per_sample, l1=l1, l2=l2, kl=kl)
    return per_sample.mean(), {k: (v.sum(), jnp.float32(v.size)) for k, v in named.items()}

  @property
  def predict_fns(self):
    def reconstruct(params, images):
      apply = functools.partial(self.vae.apply, {"params": params["vae"]})
      mean, _ = apply(to_float(images), method="encode")
      return jnp.clip(apply(mean, method="decode").astype(jnp.float32), -1, 1)

    return {"reconstruct": reconstruct}
