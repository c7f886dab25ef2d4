"""Stage 1: encoder, FSQ and flow decoder over the latents of a frozen VAE."""

import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.config import check_at_least_one, check_fraction, float_dtype
from flextok_jax.models import layers
from flextok_jax.models.tokenizer.decoder import NULL_CONDITIONS, Decoder
from flextok_jax.models.tokenizer.encoder import Encoder
from flextok_jax.models.tokenizer.flextok import FlexTok, Sampler, sample_latents
from flextok_jax.models.transformer import MODULATIONS, PatchTransformer, mlp_hidden, remat_name
from flextok_jax.models.vae.autoencoder import sample_posterior
from flextok_jax.ops import flow, fsq, nested, posemb
from flextok_jax.ops import repa as repa_ops
from flextok_jax.stages import repa
from flextok_jax.stages.stage import Stage
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
  float_dtype("dtype", config.dtype)
  check_at_least_one(config, "image_size", "tokens.num_registers")
  for part in ("encoder", "decoder"):
    check_at_least_one(config, *(f"{part}.{name}" for name in ("width", "depth", "head_dim", "patch_size")))
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
    scaling_factor=config.vae.scaling_factor or 1.0,  # 0: not known before training (inputs.with_vae)
  )


def _make_part(module: type[PatchTransformer], name: str, config: ConfigDict, side: int, **fields) -> PatchTransformer:
  """Builds the encoder or decoder for latents of `side` pixels; what its section leaves out is the module's default."""
  part = module(
    num_registers=config.tokens.num_registers,
    dtype=jnp.dtype(config.dtype),
    remat=remat_name(config.remat),
    attention=config.attention,
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
  if not 0 < c.t_shift < math.inf:
    raise ValueError(f"flow.t_shift must be a number above 0, got {c.t_shift!r}")


def bucket_rows(size: int, most: int) -> int:
  """Returns the rows of a group: the largest divisor of the batch that is at most `most`."""
  return max(rows for rows in range(1, min(size, most) + 1) if size % rows == 0)


class TokenizerStage(Stage):
  """Trains {"encoder", "decoder"} over a frozen {"vae"}; without a VAE nothing is frozen."""

  def __init__(self, config: ConfigDict):
    self.model = make_model(config)
    check_at_least_one(config, "sampler.num_steps")
    nested.check_mode(config.tokens.nested_dropout, config.tokens.num_registers)
    _check_flow(config)
    self.image_size = config.image_size
    self.sample_posterior = config.vae.sample_posterior and self.model.vae is not None
    self.fast = config.fast
    self.tokens = config.tokens
    self.bucket_rows = config.tokens.bucket_rows
    of_samples = ("null_prob", "quantization_dropout", "corruption")  # shares
    _, self.unquantized, self.corruption = (check_fraction(f"tokens.{k}", self.tokens[k]) for k in of_samples)
    self.flow = config.flow
    self.projector = repa.make_projector(config, self.model.decoder)
    self.repa, self.repa_grid = repa.section(config), repa.decoder_grid(config)
    self.sampler = Sampler(**config.sampler)

  def init(self, key):
    images = jnp.zeros((1, self.image_size, self.image_size, 3))
    params = dict(self.model.init(key, images)["params"])
    frozen = {k: params.pop(k) for k in ("vae",) if k in params}
    return params, frozen

  def init_auxiliary(self, key):
    """The projector of REPA, which training alone needs: {"repa"}, or {} where REPA is off."""
    if self.projector is None:
      return {}, {}
    return {"repa": self.projector.init(key, jnp.zeros((1, 1, self.model.decoder.width)))["params"]}, {}

  def loss_fn(self, params, batch, key, step):
    """Flow-matching loss under nested dropout and condition dropout; also by bucket of kept tokens.

    `batch` has image [b, H, W, 3], or in its place latents [b, h, w, 2 c], the VAE's moments as latent shards hold them
    (data/shards/latents.py). With REPA also teacher [b, g * g, d], the teacher's features of the same images.
    """
    del step
    posterior_key, key = jax.random.split(key)
    posterior_key = posterior_key if self.sample_posterior else None
    if "latents" in batch:
      mean, logvar = jnp.split(batch["latents"].astype(jnp.float32), 2, axis=-1)
      latents = mean if posterior_key is None else sample_posterior(mean, logvar, posterior_key)
      latents = self.model.scaling_factor * latents
    else:
      latents = self.model.apply({"params": params}, batch["image"], posterior_key, method="encode_latents")
    return self.latents_loss(params, jax.lax.stop_gradient(latents), key, batch.get("teacher"))

  def latents_loss(self, params, latents, key, teacher=None):
    """The loss of latents [b, h, w, c], with REPA also of the teacher's features [b, g * g, d].

    Rows are in groups, in each of which the numbers of kept registers are stratified (nested.sample_kept). So the row's
    place bounds its number, and rows of like bounds form a bucket that runs on as few registers as it needs. All groups
    have the same buckets: where devices hold whole groups, each runs the same program on its own rows.
    """
    keys = dict(zip(("order", "t", "t_order", "noise", "kept"), jax.random.split(key, 5)))
    size, n = latents.shape[0], self.tokens.num_registers
    rows = bucket_rows(size, self.bucket_rows)
    by_group = lambda x: jnp.asarray(x).reshape(-1, rows, *x.shape[1:])
    # Which image keeps how much is left to chance: rows are shuffled within the groups, times over the batch.
    order = jax.random.permutation(keys["order"], rows)
    latents = by_group(latents)[:, order]
    t = flow.sample_t(keys["t"], size, self.flow.t_sampling, self.flow.mode_scale, self.flow.t_shift)
    t = by_group(jax.random.permutation(keys["t_order"], t))
    noise = jax.random.normal(keys["noise"], latents.shape)
    law = (self.tokens.nested_dropout, self.tokens.null_prob)
    keep_k, drop = nested.sample_kept(keys["kept"], size // rows, rows, n, *law)
    disturb = self._sample_disturbance(key, keep_k.shape)

    if self.fast:
      bounds = nested.row_bounds(law[0], n, law[1], rows)
      buckets = _runs([nested.slots(k, n) if k else 0 for k in bounds])
    else:
      buckets = [(0, rows, n)]
    # Much of the decoder's parameters, for one vector a row: read once for all buckets, and their gradient summed once.
    modulations = self.model.apply({"params": params}, t.reshape(-1), method="modulations")
    modulations = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], *t.shape, x.shape[-1]), modulations)
    outcomes = []
    for first, end, slots in buckets:
      rows_of = lambda x: x[:, first:end].reshape(-1, *x.shape[2:])  # noqa: B023 called at once
      cut = lambda x: x[..., first:end, :].reshape(*x.shape[:-3], -1, x.shape[-1])  # noqa: B023 called at once
      parts = [rows_of(x) for x in (latents, t, noise, keep_k, drop)]
      outcome = self._bucket_loss(params, slots, *parts, jax.tree.map(cut, modulations), jax.tree.map(rows_of, disturb))
      outcomes.append([x.reshape(-1, end - first, *x.shape[1:]) for x in outcome])
    joined = (jnp.concatenate(x, 1) for x in zip(*outcomes))
    per_sample, saturation, *features = (x.reshape(-1, *x.shape[2:]) for x in joined)
    keep_k, drop = keep_k.reshape(-1), drop.reshape(-1)

    def where(mask):
      return jnp.where(mask, per_sample, 0).sum(), mask.sum().astype(jnp.float32)

    metrics = {"loss": where(jnp.ones(size, bool)), "loss_null": where(drop)}
    low = 0
    for high in nested.lengths(n):
      metrics[f"loss_k{high}"] = where(~drop & (keep_k > low) & (keep_k <= high))
      low = high
    metrics["saturation"] = saturation.sum(), jnp.float32(size)
    loss = per_sample + self.tokens.saturation_weight * saturation
    if self.projector is not None:
      alignment = self._alignment(params, *features, by_group(teacher)[:, order])
      metrics["repa"] = alignment.sum(), jnp.float32(size)
      loss = loss + self.repa.weight * alignment
    return loss.mean(), metrics

  def _alignment(self, params, features, teacher):
    """REPA's loss of each row: features [b, n, width] of the decoder, the teacher's [..., g * g, d] of the same rows.

    One call for the rows of all buckets: the projector is read once, and its gradient summed once.
    """
    teacher = teacher.reshape(-1, *teacher.shape[-2:])
    teacher = repa_ops.resize_features(jax.lax.stop_gradient(teacher), self.repa_grid, self.repa_grid)
    return repa_ops.alignment_loss(self.projector.apply({"params": params["repa"]}, features), teacher)

  def _sample_disturbance(self, key, shape):
    """(whose quantisation is skipped, bool; ids for every register to corrupt by, see fsq) of rows [groups, rows].

    None is what is off. Drawn for whole rows before they are cut into buckets, so that every cut has the same.
    """
    skip = ids = None
    if self.unquantized:  # 5 and 6: keys beside the five of latents_loss, which stay as they are
      skip = jax.random.bernoulli(jax.random.fold_in(key, 5), self.unquantized, shape)
    if self.corruption:
      shape = (*shape, self.tokens.num_registers)
      ids = fsq.sample_corruption(jax.random.fold_in(key, 6), shape, self.model.levels, self.corruption)
    return skip, ids

  def _bucket_loss(self, params, slots: int, latents, t, noise, keep_k, drop, modulations, disturb):
    """Runs the rows of a bucket on `slots` registers; 0: no row has a condition.

    Returns:
      (loss [b], saturation of the kept registers [b]); with REPA also the patches [b, n, width] after repa.block.
    """
    apply = functools.partial(self.model.apply, {"params": params})
    batch, levels = latents.shape[0], self.model.levels
    if slots:
      z = apply(latents, slots, method="encode_registers")
      skip, ids = disturb
      codes = fsq.quantize(z, levels, None if skip is None else skip[:, None])
      if ids is not None:
        codes = fsq.corrupt(codes, ids[:, :slots], levels)
      saturation = jnp.where(drop, 0.0, fsq.saturation(z, keep_k))
    else:
      codes, saturation = jnp.zeros((batch, 1, len(levels))), jnp.zeros(batch)
    velocity = functools.partial(
      apply, flow.add_noise(latents, noise, t), t, codes, keep_k, drop, modulations, method="velocity"
    )
    if self.projector is None:
      return flow.flow_loss(velocity(), latents, noise), saturation
    velocity, features = velocity(tap=self.repa.block)
    return flow.flow_loss(velocity, latents, noise), saturation, features

  @property
  def predict_fns(self):
    """tokenize(params, images, num_tokens) -> ids [b, num_tokens], by default all registers;
    detokenize(params, ids, keep_k [b], keys [b]) -> images, in less time from fewer ids (see sample_latents).
    """

    def tokenize(params, images, num_tokens=None):
      return self.model.apply({"params": params}, images, num_tokens, method="tokenize")

    def detokenize(params, token_ids, keep_k, keys):
      shape = self.model.latent_shape(self.image_size)
      noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
      latents = sample_latents(self.model, params, token_ids, keep_k, noise, self.sampler, self.fast)
      return jnp.clip(self.model.apply({"params": params}, latents, method="decode_latents"), -1, 1)

    return {"tokenize": tokenize, "detokenize": detokenize}


def _runs(slots: list[int]) -> list[tuple[int, int, int]]:
  """Equal neighbours as (first, end, value)."""
  edges = [i for i in range(len(slots) + 1) if i in (0, len(slots)) or slots[i] != slots[i - 1]]
  return [(first, end, slots[first]) for first, end in zip(edges, edges[1:])]
