"""Stage 0: the autoencoder, by reconstruction, perceptual, KL and adversarial losses."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.core.images import to_float
from flextok_jax.models.activations import of_vae
from flextok_jax.models.perception.lpips import LPIPS
from flextok_jax.models.vae import tiling
from flextok_jax.models.vae.autoencoder import AutoencoderKL, kl_divergence, last_conv, sample_posterior
from flextok_jax.models.vae.discriminator import PatchDiscriminator, patches_of
from flextok_jax.ops import adversarial, distances
from flextok_jax.stages.stage import Maps, Params, Stage

_LPIPS_NET = "vgg"  # the usual training loss


def make_vae(config: ConfigDict) -> AutoencoderKL:
  """Builds the autoencoder from config.vae.

  Raises:
    ValueError: the image size or the size of tiles does not fit.
  """
  c = config.vae
  vae = AutoencoderKL(
    latent_channels=c.latent_channels,
    block_out_channels=tuple(c.block_out_channels),
    layers_per_block=c.layers_per_block,
    norm_groups=c.norm_groups,
    dtype=jnp.dtype(c.dtype),
  )
  tiling.check(vae, c.tile)
  if config.image_size % vae.downscale:
    raise ValueError(f"image_size {config.image_size} is not a multiple of the VAE's downscale {vae.downscale}")
  return vae


def make_discriminator(config: ConfigDict) -> PatchDiscriminator | None:
  """Builds the discriminator from config.discriminator; None if its weight is 0.

  Raises:
    ValueError: too many layers for the image size.
  """
  c = config.discriminator
  if not c.weight:
    return None
  if patches_of(config.image_size, c.num_layers) < 1:
    raise ValueError(
      f"discriminator.num_layers={c.num_layers} leaves no patch of images of {config.image_size} px: "
      f"they need {3 * 2**c.num_layers} px"
    )
  return PatchDiscriminator(c.channels, c.num_layers, make_vae(config).dtype)


class VAEStage(Stage):
  """Trains AutoencoderKL {"vae"} and, if its weight is above 0, a {"discriminator"}; {"lpips"} is frozen.

  As the autoencoders of latent diffusion models (Rombach et al. 2022, after Esser et al. 2021), with two differences.
  Both networks are updated at once, each with the gradient at the same parameters, so that one backward pass through
  the autoencoder serves both; their trainer alternates, with two forward passes. Errors are means over pixels, not
  sums.
  """

  parts = ("vae",)

  def __init__(self, config: ConfigDict):
    if config.vae.kind != "autoencoder_kl":
      raise ValueError(f"stage 'vae' trains vae.kind 'autoencoder_kl', got {config.vae.kind!r}")
    self.loss_weights = config.vae_loss
    self.lpips_weight = config.vae_loss.lpips_weight
    self.image_size = config.image_size
    self.vae = make_vae(config)
    for height, width in config.data.shapes:
      if height % self.vae.downscale or width % self.vae.downscale:
        raise ValueError(
          f"data.shapes has {height} x {width} pixels, but height and width must be multiples of {self.vae.downscale}"
        )
    self.lpips = LPIPS(_LPIPS_NET, self.vae.dtype) if self.lpips_weight else None
    self.discriminator = make_discriminator(config)
    self.adversarial = config.discriminator

  def init_model(self, key: jax.Array) -> tuple[Params, Params]:
    return {"vae": self.vae.init(key, self._images())["params"]}, {}

  def init_auxiliary(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns ({"discriminator"}, {"lpips"}), each if it is used; the weights of LPIPS are random here."""
    params, frozen = {}, {}
    if self.discriminator:
      params["discriminator"] = self.discriminator.init(key, self._images())["params"]
    if self.lpips:
      frozen["lpips"] = self.lpips.init(key, self._images(), self._images())["params"]
    return params, frozen

  @property
  def pretrained_networks(self) -> dict[str, str]:
    return {"lpips": f"lpips_{_LPIPS_NET}"} if self.lpips else {}

  def _images(self) -> jax.Array:
    return jnp.zeros((1, self.image_size, self.image_size, 3))

  def activation_bytes(self, rows: float, maps: Maps, images: bool) -> float:
    return rows * of_vae(self.vae, self.image_size, self.lpips is not None)

  def loss_fn(self, params: Params, batch: Mapping, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict]:
    """Returns reconstruction losses, KL of the posterior (summed over a latent) and adversarial losses, batch means.

    loss = r + kl_weight KL + w g + d, with reconstruction losses r = l1_weight L1 + l2_weight L2 + lpips_weight LPIPS +
    detail_weight D (distances.detail), the loss g of the generator and d of the discriminator; w = discriminator.weight
    * adversarial.adaptive_weight. g and d have weight 0 before step discriminator.start_step. Gradients flow into the
    autoencoder from r, KL and g only, into the discriminator from d only; w is a constant. Without
    vae_loss.train_encoder, none flows into the encoder.

    The gradients dr and dg of r and g at the reconstruction are needed for w, and suffice for the backward pass of the
    decoder: the loss has the gradient of sum((dr + w dg) * reconstruction), so there is only one such pass.
    """
    w = self.loss_weights
    vae: Callable[..., Any] = functools.partial(self.vae.apply, {"params": params["vae"]})
    images = to_float(batch["image"])
    mean, logvar = vae(images, method="encode")
    if not w.train_encoder:
      mean, logvar = jax.lax.stop_gradient((mean, logvar))
    latents = sample_posterior(mean, logvar, key)
    recon, features = vae(latents, method="decode_with_features")
    kl = kl_divergence(mean, logvar)
    fixed = jax.lax.stop_gradient({**params, "recon": recon, "features": features})

    def reconstruction(recon):
      losses = dict(l1=jnp.abs(recon - images).mean((1, 2, 3)), l2=jnp.square(recon - images).mean((1, 2, 3)))
      total = w.l1_weight * losses["l1"] + w.l2_weight * losses["l2"]
      if self.lpips:
        to_unit = lambda x: (x + 1) / 2
        losses["lpips"] = self.lpips.apply({"params": fixed["lpips"]}, to_unit(recon), to_unit(images))
        total += self.lpips_weight * losses["lpips"]
      if w.detail_weight:
        losses["detail"] = distances.detail(recon, images)
        total += w.detail_weight * losses["detail"]
      return total.mean(), (total, losses)

    (_, (total, losses)), at_recon = jax.value_and_grad(reconstruction, has_aux=True)(fixed["recon"])
    per_sample = total + w.kl_weight * kl
    loss, metrics = per_sample.mean(), {}
    to_descend = w.kl_weight * kl.mean()
    if self.discriminator:
      value, at_recon, against, metrics = self._adversarial(params, fixed, images, at_recon, step)
      loss += value
      to_descend += against
    to_descend += jnp.sum(at_recon * recon)
    losses |= dict(kl=kl, posterior_std=jnp.exp(0.5 * logvar).mean((1, 2, 3)))
    metrics |= {k: (v.sum(), jnp.float32(v.size)) for k, v in losses.items()}
    metrics |= {
      "loss": (loss * kl.size, jnp.float32(kl.size)),
      "latent_mean": (latents.mean(), jnp.float32(1)),
      "latent_std": (latents.std(), jnp.float32(1)),
    }
    loss, metrics = jax.lax.stop_gradient((loss, metrics))
    return loss + (
      to_descend - jax.lax.stop_gradient(to_descend)
    ), metrics  # the value of the loss: the added term is 0

  def _adversarial(self, params, fixed, images, at_recon, step):
    """Returns (w g + d, at_recon + w dg, d, metrics): the addition to the loss, and the terms with gradients.

    Args:
      params: all parts.
      fixed: the same without gradients, with the reconstruction and the features that the last layer reads.
      images: [b, H, W, 3] in [-1, 1].
      at_recon: gradient of the reconstruction losses at the reconstruction.
      step: int32 [].
    """
    # Before start_step everything is computed with weight 0: a branch would save 1.5% of the FLOPs of a step, and its
    # collectives would have no fixed order relative to those outside, so that virtual CPU devices could deadlock.
    on = (step >= self.adversarial.start_step).astype(jnp.float32)
    apply = lambda discriminator, images: self.discriminator.apply({"params": discriminator}, images)
    generated = lambda recon: adversarial.generator_loss(apply(fixed["discriminator"], recon))
    g, dg = jax.value_and_grad(generated)(fixed["recon"])
    last = fixed["vae"]["decoder"]["conv_out"]
    head = lambda kernel: last_conv(self.vae.dtype).apply({"params": last | {"kernel": kernel}}, fixed["features"])
    out, of_kernel = jax.vjp(head, last["kernel"])
    kernel_grads = (of_kernel(x.astype(out.dtype))[0] for x in (at_recon, dg))
    weight = self.adversarial.weight * adversarial.adaptive_weight(*kernel_grads)
    real, fake = apply(params["discriminator"], images), apply(params["discriminator"], fixed["recon"])
    d = adversarial.discriminator_loss(real, fake)
    values = dict(
      loss_generator=g, loss_discriminator=d, logits_real=real.mean(), logits_fake=fake.mean(), adaptive_weight=weight
    )
    metrics = {name: (on * x, on) for name, x in values.items()}  # count 0 before start_step
    return on * (weight * g + d), at_recon + on * weight * dg, on * d, metrics

  @property
  def predict_fns(self) -> dict[str, Callable]:
    def reconstruct(params, images):
      apply = functools.partial(self.vae.apply, {"params": params["vae"]})
      mean, _ = apply(to_float(images), method="encode")
      return jnp.clip(apply(mean, method="decode").astype(jnp.float32), -1, 1)

    def moments(params, images):
      """Returns means of the latents (samples of the posterior, unscaled) of each image, and of their squares, [b]."""
      mean, logvar = self.vae.apply({"params": params["vae"]}, to_float(images), method="encode")
      return mean.mean((1, 2, 3)), (jnp.square(mean) + jnp.exp(logvar)).mean((1, 2, 3))

    return {"reconstruct": reconstruct, "moments": moments}
