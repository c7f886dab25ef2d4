"""Stage 1: encoder, FSQ and flow decoder over the latents of a frozen VAE."""

import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax import settings
from flextok_jax.models import layers
from flextok_jax.models.decoder import NULL_CONDITIONS, Decoder
from flextok_jax.models.encoder import Encoder
from flextok_jax.models.flextok import FlexTok, sample_latents
from flextok_jax.models.transformer import MODULATIONS, PatchTransformer, mlp_hidden
from flextok_jax.ops import flow, fsq, guidance, nested, posemb
from flextok_jax.stages.vae import make_vae

# The names that a field of config.encoder or config.decoder may hold.
_NAMES = {
    "activation": tuple(layers.ACTIVATIONS),
    "posemb": posemb.KINDS,
    "posemb_scaling": posemb.SCALINGS,
    "modulation": MODULATIONS,
    "null_condition": NULL_CONDITIONS,
}


def make_model(config: ConfigDict) -> FlexTok:
  """Builds FlexTok from a config.

  Raises:
    ValueError: naming the value, when there is no such choice or sizes do not fit together.
  """
  settings.float_dtype("dtype", config.dtype)
  settings.at_least_one(config, "image_size", "tokens.num_registers")
  for part in ("encoder", "decoder"):
    settings.at_least_one(config, *(f"{part}.{name}" for name in ("width", "depth", "head_dim", "patch_size")))
  if config.vae.kind not in ("autoencoder_kl", "pixels"):
    raise ValueError(f"unknown vae.kind {config.vae.kind!r}: 'autoencoder_kl' or 'pixels'")
  levels = tuple(config.tokens.levels)
  if not levels or any(not isinstance(level, int) or level < 2 for level in levels):
    raise ValueError(f"tokens.levels must be whole numbers of at least 2, got {levels}")
  vae = make_vae(config) if config.vae.kind == "autoencoder_kl" else None
  side = config.image_size // (1 if vae is None else vae.downscale)
  return FlexTok(
      encoder=_make_part(Encoder, "encoder", config, side, code_dim=len(levels)),
      decoder=_make_part(Decoder, "decoder", config, side),
      vae=vae,
      levels=levels,
      scaling_factor=config.vae.scaling_factor,
  )


def _make_part(module: type[PatchTransformer], name: str, config: ConfigDict, side: int, **fields) -> PatchTransformer:
  """Builds the encoder or decoder for latents of `side` pixels; what its section leaves out is the module's default."""
  part = module(
      num_registers=config.tokens.num_registers,
      dtype=jnp.dtype(config.dtype),
      remat=config.remat,
      **config[name],
      **fields,
  )
  for field, names in _NAMES.items():
    value = getattr(part, field, names[0])
    if value not in names:
      raise ValueError(f"unknown {name}.{field} {value!r}: one of {', '.join(names)}")
  if part.width % part.head_dim:
    raise ValueError(f"{name}.width {part.width} is not a multiple of {name}.head_dim {part.head_dim}")
  if part.posemb == "sincos" and part.width % 4:
    raise ValueError(f"{name}.width {part.width} is not a multiple of 4, which {name}.posemb 'sincos' needs")
  if not 0 < part.mlp_ratio < math.inf or mlp_hidden(part.width, part.mlp_ratio, part.gated_mlp) < 1:
    raise ValueError(f"{name}.mlp_ratio must be a number above 0 that leaves a hidden width, got {part.mlp_ratio!r}")
  if not math.isfinite(part.readout_multiplier):
    raise ValueError(f"{name}.readout_multiplier must be finite, got {part.readout_multiplier!r}")
  if not 0 < getattr(part, "max_timestep", 1.0) < math.inf:
    raise ValueError(f"{name}.max_timestep must be a number above 0, got {part.max_timestep!r}")
  if side < part.patch_size or side % part.patch_size:
    raise ValueError(
        f"image_size {config.image_size} gives {side} latent pixels a side, "
        f"which is not a multiple of {name}.patch_size {part.patch_size}"
    )
  grid = side // part.patch_size
  if not isinstance(part.max_grid, int) or part.max_grid < 0:
    raise ValueError(f"{name}.max_grid must be a number of patches, or 0 for image_size's, got {part.max_grid!r}")
  if part.posemb_scaling == "absolute" and 0 < part.max_grid < grid:
    raise ValueError(
        f"{name}.max_grid {part.max_grid} is less than the {grid} patches a side of image_size {config.image_size}: "
        f"raise it, or set {name}.posemb_scaling to 'interpolate'"
    )
  return part.clone(max_grid=part.max_grid or grid)


def _check_flow(config: ConfigDict):
  """Raises ValueError for an unknown law of the training times, or one that does not run from 1 down to 0."""
  c = config.flow
  if c.t_sampling not in flow.T_SAMPLINGS:
    raise ValueError(f"unknown flow.t_sampling {c.t_sampling!r}: one of {', '.join(flow.T_SAMPLINGS)}")
  high = 2 / (math.pi - 2)  # the slope of t(u) is at most 0 from -1 to here
  if c.t_sampling == "mode" and not -1 <= c.mode_scale <= high:
    raise ValueError(f"flow.mode_scale must lie in [-1, {high:.4f}], where t falls from 1 to 0, got {c.mode_scale!r}")


class TokenizerStage:
  """Trains {"encoder", "decoder"} over a frozen {"vae"}; without a VAE nothing is frozen."""

  def __init__(self, config: ConfigDict):
    self.model = make_model(config)
    settings.at_least_one(config, "sampler.num_steps")
    nested.check_mode(config.tokens.nested_dropout, config.tokens.num_registers)
    _check_flow(config)
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
