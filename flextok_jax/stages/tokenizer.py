"""Stage 1: encoder, FSQ and flow decoder over the latents of a frozen VAE."""

import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax import settings
from flextok_jax.models.decoder import Decoder
from flextok_jax.models.encoder import Encoder
from flextok_jax.models.flextok import FlexTok, sample_latents
from flextok_jax.ops import flow, fsq, guidance, nested
from flextok_jax.stages.vae import make_vae


def make_model(config: ConfigDict) -> FlexTok:
  """Builds FlexTok from a config.

  Raises:
    ValueError: naming the value, when sizes do not fit together.
  """
  dtype = settings.float_dtype("dtype", config.dtype)
  settings.at_least_one(config, "image_size", "tokens.num_registers")
  for part in ("encoder", "decoder"):
    settings.at_least_one(config, *(f"{part}.{name}" for name in ("width", "depth", "head_dim", "patch_size")))
    width, head_dim = config[part].width, config[part].head_dim
    if width % head_dim or width % 4:
      raise ValueError(f"{part}.width {width} is not a multiple of 4 and of head_dim {head_dim}")
  if config.vae.kind not in ("autoencoder_kl", "pixels"):
    raise ValueError(f"unknown vae.kind {config.vae.kind!r}: 'autoencoder_kl' or 'pixels'")
  levels = tuple(config.tokens.levels)
  if not levels or any(not isinstance(level, int) or level < 2 for level in levels):
    raise ValueError(f"tokens.levels must be whole numbers of at least 2, got {levels}")
  model = FlexTok(
      encoder=Encoder(
          num_registers=config.tokens.num_registers,
          code_dim=len(config.tokens.levels),
          dtype=dtype,
          remat=config.remat,
          **config.encoder,
      ),
      decoder=Decoder(
          num_registers=config.tokens.num_registers,
          dtype=dtype,
          remat=config.remat,
          **config.decoder,
      ),
      vae=make_vae(config) if config.vae.kind == "autoencoder_kl" else None,
      levels=levels,
      scaling_factor=config.vae.scaling_factor,
  )
  side = model.latent_shape(config.image_size)[0]
  for part in ("encoder", "decoder"):
    patch = config[part].patch_size
    if side < patch or side % patch:
      raise ValueError(
          f"image_size {config.image_size} gives {side} latent pixels a side, "
          f"which is not a multiple of {part}.patch_size {patch}"
      )
  return model


class TokenizerStage:
  """Trains {"encoder", "decoder"} over a frozen {"vae"}; without a VAE nothing is frozen."""

  def __init__(self, config: ConfigDict):
    self.model = make_model(config)
    settings.at_least_one(config, "sampler.num_steps")
    nested.check_mode(config.tokens.nested_dropout, config.tokens.num_registers)
    if config.flow.t_sampling not in flow.T_SAMPLINGS:
      raise ValueError(f"unknown flow.t_sampling {config.flow.t_sampling!r}: one of {', '.join(flow.T_SAMPLINGS)}")
    if config.sampler.guidance not in guidance.MODES:
      raise ValueError(f"unknown sampler.guidance {config.sampler.guidance!r}: one of {', '.join(guidance.MODES)}")
    self.image_size = config.image_size
    self.sample_posterior = config.vae.sample_posterior and self.model.vae is not None
    self.tokens = config.tokens
    self.flow = config.flow
    s = config.sampler
    self.sampler = dict(s, mode=s.guidance)
    del self.sampler["guidance"]

  def init(self, key):
    images = jnp.zeros((1, self.image_size, self.image_size, 3))
    params = dict(self.model.init(key, images)["params"])
    frozen = {k: params.pop(k) for k in ("vae",) if k in params}
    return params, frozen

  def loss_fn(self, params, batch, key):
    """Flow-matching loss under nested dropout and condition dropout; also by bucket of kept tokens."""
    apply = functools.partial(self.model.apply, {"params": params})
    keys = dict(zip(("posterior", "t", "noise", "keep_k", "null"), jax.random.split(key, 5)))
    n, size = self.tokens.num_registers, batch["image"].shape[0]
    latents = apply(
        batch["image"], keys["posterior"] if self.sample_posterior else None, method="encode_latents"
    )
    latents = jax.lax.stop_gradient(latents)
    t = flow.sample_t(keys["t"], size, self.flow.t_sampling, self.flow.mode_scale, self.flow.t_shift)
    noise = jax.random.normal(keys["noise"], latents.shape)
    keep_k = nested.sample_keep_k(keys["keep_k"], size, n, self.tokens.nested_dropout)
    drop = jax.random.bernoulli(keys["null"], self.tokens.null_prob, (size,))
    z = apply(latents, method="encode_registers")
    codes = fsq.quantize(z, self.model.levels)
    velocity = apply(flow.add_noise(latents, noise, t), t, codes, keep_k, drop, method="velocity")
    per_sample = flow.flow_loss(velocity, latents, noise)
    saturation = fsq.saturation(z)

    def where(mask):
      return jnp.where(mask, per_sample, 0).sum(), mask.sum().astype(jnp.float32)

    metrics = {"loss": where(jnp.ones(size, bool)), "loss_null": where(drop)}
    low = 0
    for high in nested.lengths(n):
      metrics[f"loss_k{high}"] = where(~drop & (keep_k > low) & (keep_k <= high))
      low = high
    metrics["saturation"] = saturation.sum(), jnp.float32(size)
    return (per_sample + self.tokens.saturation_weight * saturation).mean(), metrics

  @property
  def predict_fns(self):
    """tokenize(params, images) -> ids [b, num_registers]; detokenize(params, ids, keep_k [b], keys [b]) -> images."""

    def tokenize(params, images):
      return self.model.apply({"params": params}, images, method="tokenize")

    def detokenize(params, token_ids, keep_k, keys):
      shape = self.model.latent_shape(self.image_size)
      noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
      latents = sample_latents(self.model, params, token_ids, keep_k, noise, **self.sampler)
      return jnp.clip(self.model.apply({"params": params}, latents, method="decode_latents"), -1, 1)

    return {"tokenize": tokenize, "detokenize": detokenize}
