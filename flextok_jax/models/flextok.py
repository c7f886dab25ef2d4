"""The one place that joins VAE, encoder, FSQ and flow decoder."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models.decoder import Decoder
from flextok_jax.models.encoder import Encoder
from flextok_jax.models.vae import AutoencoderKL, sample_posterior
from flextok_jax.ops import flow, fsq, guidance


def to_float(images: jax.Array) -> jax.Array:
  """uint8 in [0, 255] or float in [-1, 1] -> float32 in [-1, 1]."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 127.5 - 1
  return images.astype(jnp.float32)


class FlexTok(nn.Module):
  """Images to ordered discrete tokens and back (arXiv 2502.13967).

  Without a VAE (vae=None) the latents are the scaled image itself: the pixel-space variant for tiny models. Without
  encoder and decoder it is a VAE alone, with latents but no tokens.
  """

  encoder: Encoder | None
  decoder: Decoder | None
  levels: Sequence[int]
  vae: AutoencoderKL | None = None
  scaling_factor: float = 1.0  # latents = scaling_factor * VAE latents (or image)

  @property
  def num_registers(self) -> int:
    return self.encoder.num_registers

  @property
  def downscale(self) -> int:
    """Image pixels a side of one latent pixel."""
    return 1 if self.vae is None else self.vae.downscale

  def latent_shape(self, image_size: int) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the latents of a square image."""
    side = image_size // self.downscale
    return side, side, 3 if self.vae is None else self.vae.latent_channels

  def encode_latents(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """images uint8 or float [b, H, W, 3] -> latents [b, h, w, c]: the posterior's mode, or with a key a sample."""
    images = to_float(images)
    if self.vae is None:
      return self.scaling_factor * images
    mean, logvar = self.vae.encode(images)
    latents = mean if key is None else sample_posterior(mean, logvar, key)
    return self.scaling_factor * latents.astype(jnp.float32)

  def decode_latents(self, latents: jax.Array) -> jax.Array:
    """latents [b, h, w, c] -> images float32 [b, H, W, 3], about [-1, 1] and not clipped."""
    latents = latents / self.scaling_factor
    return latents if self.vae is None else self.vae.decode(latents).astype(jnp.float32)

  def encode_registers(self, latents: jax.Array, num_tokens: int | None = None) -> jax.Array:
    """latents [b, h, w, c] -> what FSQ will quantise, [b, num_tokens, len(levels)]."""
    return self.encoder(latents, num_tokens)

  def encode(self, latents: jax.Array, num_tokens: int | None = None) -> jax.Array:
    """latents [b, h, w, c] -> codes [b, num_tokens, len(levels)] in [-1, 1], straight-through."""
    return fsq.quantize(self.encode_registers(latents, num_tokens), self.levels)

  def velocity(
      self, x_t: jax.Array, t: jax.Array, codes: jax.Array, keep_k: jax.Array, drop_condition: jax.Array
  ) -> jax.Array:
    """See Decoder."""
    return self.decoder(x_t, t, codes, keep_k, drop_condition)

  def tokenize(self, images: jax.Array, num_tokens: int | None = None, key: jax.Array | None = None) -> jax.Array:
    """images [b, H, W, 3] -> token_ids int32 [b, num_tokens]."""
    return fsq.codes_to_ids(self.encode(self.encode_latents(images, key), num_tokens), self.levels)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Touches every parameter; for initialisation."""
    latents = self.encode_latents(images)
    batch = latents.shape[0]
    codes = self.encode(latents)
    keep_k = jnp.full(batch, self.num_registers)
    v = self.velocity(latents, jnp.zeros(batch), codes, keep_k, jnp.zeros(batch, bool))
    return self.decode_latents(v)


def sample_latents(
    model: FlexTok,
    params,
    token_ids: jax.Array,
    keep_k: jax.Array,
    noise: jax.Array,
    *,
    num_steps: int = 25,
    mode: str = "apg",
    guidance_scale: float | jax.Array = 7.5,
    apg_momentum: float = -0.5,
    apg_eta: float = 0.0,
    apg_threshold: float = 2.5,
) -> jax.Array:
  """Decodes token ids to latents by guided Euler steps of the flow; one scan, to be jitted by the caller.

  Args:
    token_ids: int [b, num_registers]; those at or past keep_k have no influence.
    keep_k: int [b].
    noise: starting latents [b, h, w, c].
    mode: "apg", "cfg" or "none".
    guidance_scale: a number, or one for every step [num_steps]. Without guidance, or at the number 1, there is no
      unconditional pass.

  Returns:
    latents [b, h, w, c] float32.
  """
  guidance.check_mode(mode)
  guided = mode != "none" and not (isinstance(guidance_scale, int | float) and guidance_scale == 1)
  batch = noise.shape[0]
  codes = fsq.ids_to_codes(token_ids, model.levels)
  drop = jnp.zeros(batch, bool)
  if guided:  # the unconditional half rides in the same call
    codes, keep_k = jnp.concatenate([codes, codes]), jnp.concatenate([keep_k, keep_k])
    drop = jnp.concatenate([drop, ~drop])

  def velocity_fn(x, t, running, scale):
    x = jnp.concatenate([x, x]) if guided else x
    v = model.apply({"params": params}, x, jnp.full(x.shape[0], t), codes, keep_k, drop, method="velocity")
    if not guided:
      return v, running
    v_c, v_u = jnp.split(v, 2)
    if mode == "cfg":
      return guidance.cfg(v_c, v_u, scale), running
    return guidance.apg(v_c, v_u, scale, running, apg_momentum, apg_eta, apg_threshold)

  scales = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), (num_steps,))
  return flow.euler_sample(velocity_fn, noise, num_steps, jnp.zeros_like(noise), scales)
