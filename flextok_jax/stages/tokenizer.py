"""Stage 1: encoder, FSQ and flow decoder over the latents of a frozen VAE."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.config import with_fields
from flextok_jax.config.ranges import MAX_GRID
from flextok_jax.models.activations import of_blocks, of_frozen_vae
from flextok_jax.models.tokenizer.decoder import Decoder, Inputs
from flextok_jax.models.tokenizer.encoder import Encoder
from flextok_jax.models.tokenizer.flextok import FlexTok, Sampler, sample_latents
from flextok_jax.models.transformer import PatchTransformer, mlp_hidden
from flextok_jax.models.vae.autoencoder import sample_posterior
from flextok_jax.ops import flow, fsq, nested
from flextok_jax.ops import repa as repa_ops
from flextok_jax.stages import repa
from flextok_jax.stages.stage import Maps, Params, Stage
from flextok_jax.stages.vae import make_vae

# Cost of a bucket, in rows of one register: all weights are read, and their gradients summed, once for each bucket. By
# the TPU compiler's cycles (docs/scaling.md); it saves compile time on every device.
BUCKET_OVERHEAD = 0.5


def make_model(config: ConfigDict) -> FlexTok:
  """Builds FlexTok from a config.

  Raises:
    ValueError: sizes that do not fit together.
  """
  check_sampler(config, config.sampler.num_steps, config.sampler.guidance)
  levels = tuple(config.tokens.levels)
  vae = make_vae(config) if config.vae.kind == "autoencoder_kl" else None
  side = config.image_size // (1 if vae is None else vae.downscale)
  model = FlexTok(
    encoder=_make_part(Encoder, "encoder", config, side, code_dim=len(levels)),
    decoder=_make_part(Decoder, "decoder", config, side, mask=config.tokens.mask),
    vae=vae,
    levels=levels,
    scaling_factor=config.vae.scaling_factor or 1.0,  # 0: set by training (inputs.with_weights)
    base_side=config.flow.base_size / (1 if vae is None else vae.downscale),
    tile=config.vae.tile,
  )
  if config.tokens.layout == "grid":
    _check_grid(config)
  if model.decoder.interval and config.stage != "distill":
    raise ValueError(f"decoder.interval=True is for stage 'distill', not {config.stage!r}")
  return model


def with_positions(
  config: ConfigDict, posemb_scaling: str, parts: Sequence[str] = ("encoder", "decoder")
) -> ConfigDict:
  """Returns a config with another posemb_scaling of these parts, of tables as large as before.

  Raises:
    ValueError: a scaling that the positions do not have.
  """
  model = make_model(config)
  fields: dict[str, Any] = {}
  for name in parts:
    fields |= {f"{name}.posemb_scaling": posemb_scaling, f"{name}.max_grid": getattr(model, name).max_grid}
  config = with_fields(config, fields)
  make_model(config)  # raises the error
  return config


def grid_tokens(config: ConfigDict) -> int:
  """Returns the number of tokens of a grid: the patches of the encoder for images of image_size."""
  downscale = 1 if config.vae.kind == "pixels" else 2 ** (len(config.vae.block_out_channels) - 1)
  return (config.image_size // downscale // config.encoder.patch_size) ** 2


def _check_grid(config: ConfigDict) -> None:
  """Raises ValueError for settings that tokens on a grid do not have."""
  count = grid_tokens(config)
  for name, value, allowed in (
    ("tokens.num_registers", config.tokens.num_registers, (count,)),
    ("tokens.nested_dropout", config.tokens.nested_dropout, ("none",)),
    ("tokens.mask", config.tokens.mask, ("token",)),
    ("decoder.modulation", config.decoder.modulation, ("shared",)),
    ("decoder.null_condition", config.decoder.null_condition, ("learned", "zero")),
  ):
    if value not in allowed:
      words = " or ".join(map(repr, allowed))
      raise ValueError(
        f"tokens.layout 'grid' has a token for each of {count} patches: {name} must be {words}, got {value!r}"
      )
  if config.encoder.patch_size % config.decoder.patch_size:
    raise ValueError(
      f"decoder.patch_size {config.decoder.patch_size} must divide encoder.patch_size {config.encoder.patch_size} with "
      "tokens.layout 'grid', where a token has whole patches of the decoder"
    )


def check_sampler(config: ConfigDict, num_steps: int, guidance: str) -> None:
  """Raises ValueError for settings of the sampler that are not for the decoder of a config, which is a student's."""
  if config.stage != "distill":
    return
  if guidance != "none":
    raise ValueError(
      "a student has no unconditional pass, and the guidance of its teacher built in: guidance must be 'none', "
      f"got {guidance!r}"
    )
  most = max(config.distill.steps)
  if num_steps > most:
    raise ValueError(f"num_steps={num_steps} is more than the {most} steps that this student was trained for")


def _make_part(module: type[PatchTransformer], name: str, config: ConfigDict, side: int, **fields: Any) -> Any:
  """Builds the encoder or decoder for latents of side x side pixels from its section of the config."""
  part = module(
    num_registers=config.tokens.num_registers,
    layout=config.tokens.layout,
    dtype=jnp.dtype(config.dtype),
    remat=config.remat,
    attention=config.attention,
    **config[name],
    **fields,
  )
  if part.width % part.head_dim:
    raise ValueError(f"{name}.width {part.width} is not a multiple of {name}.head_dim {part.head_dim}")
  if part.posemb.startswith("sincos") and part.width % 4:
    raise ValueError(f"{name}.width {part.width} is not a multiple of 4, which {name}.posemb {part.posemb!r} needs")
  if part.posemb_scaling == "scaled" and part.posemb != "sincos":
    raise ValueError(
      f"{name}.posemb_scaling 'scaled' computes positions, and {name}.posemb {part.posemb!r} has a table of them: set "
      f"{name}.posemb_scaling to 'interpolate'"
    )
  if mlp_hidden(part.width, part.mlp_ratio, part.gated_mlp) < 1:
    raise ValueError(f"{name}.mlp_ratio={part.mlp_ratio} of width {part.width} leaves no hidden width: raise it")
  if side < part.patch_size or side % part.patch_size:
    raise ValueError(
      f"image_size {config.image_size} gives {side} latent pixels per side, "
      f"which is not a multiple of {name}.patch_size {part.patch_size}"
    )
  grid = side // part.patch_size
  if grid > MAX_GRID:
    raise ValueError(
      f"image_size {config.image_size} gives {grid} patches per side of the {name}, at most {MAX_GRID}: lower it, or "
      f"raise {name}.patch_size"
    )
  for field in ("max_grid", "max_grid_width"):
    most = getattr(part, field)
    if part.posemb_scaling == "absolute" and 0 < most < grid:
      raise ValueError(
        f"{name}.{field} {most} is less than the {grid} patches per side of image_size {config.image_size}: "
        f"raise it, or set {name}.posemb_scaling to 'interpolate'"
      )
  height, width = part.clone(max_grid=part.max_grid or grid).table_shape
  return part.clone(max_grid=height, max_grid_width=0 if width == height else width)


def bucket_rows(size: int, most: int) -> int:
  """Returns the number of rows per group: the largest divisor of the batch size that is at most `most`."""
  return max(rows for rows in range(1, min(size, most) + 1) if size % rows == 0)


def check_shapes(shapes: Sequence[tuple[int, int]], model: FlexTok, layout: str) -> None:
  """Raises ValueError for shapes (height, width) of images that the patches of a model or its positions do not fit.

  Args:
    shapes: config.data.shapes.
    model: to train.
    layout: of its tokens.
  """
  if shapes and layout == "grid":
    raise ValueError("data.shapes must be () with tokens.layout 'grid', where each token has its place in a grid")
  for height, width in shapes:
    name, multiple = f"data.shapes has {height} x {width} pixels", model.patch_multiple
    if height % multiple or width % multiple:
      fit = " x ".join(str(max(round(side / multiple), 1) * multiple) for side in (height, width))
      raise ValueError(f"{name}, but height and width must be multiples of {multiple}, as are {fit}")
    for part, module in (("encoder", model.encoder), ("decoder", model.decoder)):
      grid = [side // model.downscale // module.patch_size for side in (height, width)]
      try:
        module.check_grid(*grid)
      except ValueError:
        table = " x ".join(map(str, module.table_shape))
        raise ValueError(
          f"{name}, {grid[0]} x {grid[1]} patches of the {part}, which has {table} positions: set {part}.max_grid to "
          f"{max(grid)} or more, or {part}.posemb_scaling to 'scaled' or 'interpolate'"
        ) from None


class Rows(flax.struct.PyTreeNode):
  """Rows of a batch with their random draws: g groups of r rows, or in a bucket one axis [b] in place of [g, r]."""

  latents: jax.Array  # [g, r, h, w, c]
  t: jax.Array  # [g, r], times in [0, 1]
  noise: jax.Array  # [g, r, h, w, c]
  keep_k: jax.Array  # int [g, r]
  drop: jax.Array  # bool [g, r], True: no condition
  unquantized: jax.Array | None  # bool [g, r], True: not quantised; None: off
  corruption: jax.Array | None  # int [g, r, num_registers], see fsq.sample_corruption; None: off
  modulations: tuple[jax.Array, jax.Array | None]  # of the times: blocks [depth, g, r, f], head [g, r, 2 * width]

  def bucket(self, first: int, end: int) -> "Rows":
    """Returns the rows first .. end - 1 of all groups: [g, r, ...] -> [g * (end - first), ...]."""
    modulations = cut_modulations(self.modulations, first, end)
    return bucket_of(self.replace(modulations=None), first, end).replace(modulations=modulations)


def group(x: jax.Array, rows: int) -> jax.Array:
  """[b, ...] -> [b / rows, rows, ...]."""
  return jnp.asarray(x).reshape(-1, rows, *x.shape[1:])


def ungroup(x: jax.Array) -> jax.Array:
  """[g, r, ...] -> [g * r, ...]."""
  return x.reshape(-1, *x.shape[2:])


def bucket_of(rows: Any, first: int, end: int) -> Any:
  """Returns the rows first .. end - 1 of all groups: a tree of [g, r, ...] -> [g * (end - first), ...]."""
  return jax.tree.map(lambda x: ungroup(x[:, first:end]), rows)


def cut_modulations(modulations: Any, first: int, end: int) -> Any:
  """Returns those of the rows first .. end - 1 of all groups: tree of [..., g, r, f] -> [..., g * (end - first), f]."""
  return jax.tree.map(lambda x: x[..., first:end, :].reshape(*x.shape[:-3], -1, x.shape[-1]), modulations)


class TokenizerStage(Stage):
  """Trains {"encoder", "decoder"} on latents of a frozen {"vae"}, or on pixels without a VAE."""

  parts: tuple[str, ...] = ("encoder", "decoder")
  block_parts = parts
  runs = 1  # times that the loss runs the decoder for each row

  def __init__(self, config: ConfigDict):
    self.model = make_model(config)
    check_shapes(config.data.shapes, self.model, config.tokens.layout)
    nested.check_mode(config.tokens.nested_dropout, config.tokens.num_registers)
    self.image_size = config.image_size
    self.sample_posterior = config.vae.sample_posterior and self.model.vae is not None
    self.fast = config.fast
    self.tokens = config.tokens
    self.quantization_dropout, self.corruption_rate = self.tokens.quantization_dropout, self.tokens.corruption
    self.flow = config.flow
    self.projector: Any = repa.make_projector(config, self.model.decoder)
    self.repa: Any
    self.repa, self.repa_grid = repa.section(config), repa.teacher_grid(config)
    self.sampler = Sampler(**config.sampler)

  def init_model(self, key: jax.Array) -> tuple[Params, Params]:
    images = jnp.zeros((1, self.image_size, self.image_size, 3))
    params = dict(self.model.init(key, images)["params"])
    frozen = {k: params.pop(k) for k in ("vae",) if k in params}
    return params, frozen

  def init_auxiliary(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns ({"repa": the projector}, {}), or ({}, {}) if REPA is off."""
    if self.projector is None:
      return {}, {}
    return {"repa": self.projector.init(key, jnp.zeros((1, 1, self.model.decoder.width)))["params"]}, {}

  def loss_fn(self, params: Params, batch: Mapping, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict]:
    """Returns the flow-matching loss with nested dropout and condition dropout; metrics also by number of kept tokens.

    `batch` has "image" [b, H, W, 3], or instead "latents" [b, h, w, 2 c], moments of the VAE as in latent shards
    (data/shards/latents.py). With REPA also "teacher" [b, n, d], features of the teacher for the same images.
    """
    del step
    posterior_key, key = jax.random.split(key)
    posterior_key = posterior_key if self.sample_posterior else None
    latents: Any
    if "latents" in batch:
      mean, logvar = jnp.split(batch["latents"].astype(jnp.float32), 2, axis=-1)
      latents = mean if posterior_key is None else sample_posterior(mean, logvar, posterior_key)
      latents = self.model.scaling_factor * latents
    else:
      latents = self.model.apply({"params": params}, batch["image"], posterior_key, method="encode_latents")
    return self.latents_loss(params, jax.lax.stop_gradient(latents), key, batch.get("teacher"))

  def latents_loss(
    self, params: Params, latents: jax.Array, key: jax.Array, teacher: jax.Array | None = None
  ) -> tuple[jax.Array, dict]:
    """Returns the loss of latents and its metrics.

    Rows are in groups, in each of which the numbers of kept registers are stratified (nested.sample_keep_k). The place
    of a row in its group bounds its number, so rows with similar bounds form a bucket that computes only as many
    registers as it needs. All groups have the same buckets: if devices hold whole groups, each runs the same program on
    its own rows.

    Args:
      params: of the model and of what the loss needs.
      latents: [b, h, w, c].
      key: of the random draws.
      teacher: features [b, n, d] of a teacher for the same images; with REPA only.

    Returns:
      The loss [], and metrics {name: (sum, count)}.
    """
    size, n = latents.shape[0], self.tokens.num_registers
    rows, order = self._draw_rows(params, latents, key)

    run = functools.partial(self._losses, params)
    per_sample, saturation, features = self._run_buckets(rows, run, Rows.bucket)
    keep_k, drop = ungroup(rows.keep_k), ungroup(rows.drop)

    # Metrics: the flow loss by number of kept registers.
    def flow_loss_of(mask):
      return jnp.where(mask, per_sample, 0).sum(), mask.sum(dtype=jnp.int32).astype(jnp.float32)

    metrics = {"loss": flow_loss_of(jnp.ones(size, bool)), "loss_null": flow_loss_of(drop)}
    low = 0
    for high in nested.powers_of_two(n):
      metrics[f"loss_k{high}"] = flow_loss_of(~drop & (keep_k > low) & (keep_k <= high))
      low = high
    metrics["saturation"] = saturation.sum(), jnp.float32(size)

    # Loss.
    loss = per_sample + self.tokens.saturation_weight * saturation
    if self.projector is not None:
      assert teacher is not None
      teacher = ungroup(group(teacher, order.size)[:, order])
      alignment = self._alignment(params, features, teacher, (latents.shape[1], latents.shape[2]))
      metrics["repa"] = alignment.sum(), jnp.float32(size)
      loss = loss + self.repa.weight * alignment
    return loss.mean(), metrics

  def _draw_rows(self, params: Params, latents: jax.Array, key: jax.Array) -> tuple[Rows, jax.Array]:
    """Returns latents [b, h, w, c] as rows with random draws, and the order of the latents within each group [r]."""
    order_key, t_key, t_order_key, noise_key, keep_key = jax.random.split(key, 5)
    size, n = latents.shape[0], self.tokens.num_registers
    count = bucket_rows(size, self.tokens.bucket_rows)
    # Shuffled, so that lengths are assigned at random: latents within their group, times over the whole batch.
    order = jax.random.permutation(order_key, jnp.arange(count, dtype=jnp.int32))
    latents = group(latents, count)[:, order]
    shift = self.flow.t_shift * self.model.t_shift(*latents.shape[2:4])
    t = flow.sample_t(t_key, size, self.flow.t_sampling, self.flow.mode_scale, shift)
    t = group(jax.random.permutation(t_order_key, t), count)
    noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
    keep_k, drop = nested.sample_keep_k(
      keep_key, size // count, count, n, self.tokens.nested_dropout, self.tokens.null_prob
    )
    # Drawn for whole rows before they are cut into buckets, so that all ways to cut them draw the same. 5 and 6: keys
    # besides the five above.
    unquantized = corruption = None
    if self.quantization_dropout:
      unquantized = jax.random.bernoulli(
        jax.random.fold_in(key, 5), np.float32(self.quantization_dropout), keep_k.shape
      )
    if self.corruption_rate:
      shape, corruption_key = (*keep_k.shape, n), jax.random.fold_in(key, 6)
      corruption = fsq.sample_corruption(corruption_key, shape, self.model.levels, self.corruption_rate)
    # Computed once for all buckets: most parameters of the decoder are read, and their gradient is summed, only once.
    modulations = self._modulations(params, t)
    return Rows(latents, t, noise, keep_k, drop, unquantized, corruption, modulations), order

  def _modulations(self, params: Params, t: jax.Array, interval: jax.Array | None = None) -> Any:
    """Returns Decoder.modulations of times [..], and of a student's intervals: a tree of [..., *t.shape, f]."""
    interval = interval if interval is None else interval.reshape(-1)
    found = self.model.apply({"params": params}, t.reshape(-1), interval, method="modulations")
    return jax.tree.map(lambda x: x.reshape(*x.shape[:-2], *t.shape, x.shape[-1]), found)

  def _buckets(self, count: int) -> list[tuple[int, int, int]]:
    """Returns the buckets of groups of `count` rows: (first row, end, registers to compute).

    0 registers: no row of the bucket has a condition.
    """
    tokens, n = self.tokens, self.tokens.num_registers
    if not self.fast:
      return [(0, count, n)]
    bounds = nested.row_bounds(tokens.nested_dropout, n, tokens.null_prob, count)
    lengths = [nested.padded_length(bound, n) if bound else 0 for bound in bounds]
    return nested.merge_buckets(lengths, self._row_cost, BUCKET_OVERHEAD * self._row_cost(1))

  def _row_cost(self, length: int) -> float:
    """Returns what a row of `length` registers costs, in units that all lengths share; attention is left out."""
    parts = [(self.model.decoder, length or 1), *([(self.model.encoder, length)] if length else [])]
    return sum(part.depth * part.width**2 * self._row_tokens(part, n) for part, n in parts)

  def _row_tokens(self, part: PatchTransformer, registers: int) -> int:
    """Returns the number of registers and patches of a row in the encoder or the decoder."""
    height, width, _ = self.model.latent_shape(self.image_size, self.image_size)
    return registers + height * width // part.patch_size**2

  def _run_buckets(
    self, rows: Any, run: Callable[[list[tuple[int, Any]]], list], cut: Callable[[Any, int, int], Any] = bucket_of
  ) -> Any:
    """Runs a function on all buckets and joins what it returns of each.

    Args:
      rows: tree of [g, r, ...].
      run: (registers to compute, rows [b, ...]) of each bucket -> tree of [b, ...] of each bucket.
      cut: see bucket_of.

    Returns:
      Tree of [g * r, ...].
    """
    buckets = self._buckets(jax.tree.leaves(rows)[0].shape[1])
    outputs = run([(length, cut(rows, first, end)) for first, end, length in buckets])
    # [g * (end - first), ...] -> [g, end - first, ...]
    parts = [jax.tree.map(lambda x, n=end - first: group(x, n), y) for (first, end, _), y in zip(buckets, outputs)]
    # [g, r_i, ...] each -> [g * r, ...]
    return jax.tree.map(lambda *parts: ungroup(jnp.concatenate(parts, 1)), *parts)

  def _losses(
    self, params: Params, batches: Sequence[tuple[int, Rows]]
  ) -> list[tuple[jax.Array, jax.Array, jax.Array | None]]:
    """Computes the rows [b, ...] of each bucket on its number of registers; 0: no row has a condition.

    Returns:
      Of each bucket, flow loss [b]; saturation of the kept registers [b]; with REPA the patches [b, n, width] after
      block repa.block, else None.
    """
    apply: Callable[..., Any] = functools.partial(self.model.apply, {"params": params})
    levels = self.model.levels

    # Encode the buckets that have a condition.
    encoded = apply([(rows.latents, length) for length, rows in batches if length], method="encode_batches")
    vectors, inputs, saturations = iter(encoded), [], []
    for length, rows in batches:
      if length:
        z = next(vectors)
        skip = None if rows.unquantized is None else rows.unquantized[:, None]
        codes = fsq.quantize(z, levels, skip)  # [b, length, len(levels)]
        if rows.corruption is not None:
          codes = fsq.corrupt(codes, rows.corruption[:, :length], levels)
        saturations.append(jnp.where(rows.drop, 0.0, fsq.saturation(z, rows.keep_k)))
      else:
        codes = jnp.zeros((rows.drop.size, 1, len(levels)), jnp.float32)
        saturations.append(jnp.zeros(rows.drop.size, jnp.float32))
      x_t = flow.add_noise(rows.latents, rows.noise, rows.t)
      inputs.append(Inputs(x_t, rows.t, codes, rows.keep_k, rows.drop, rows.modulations))

    # Decode.
    block = None if self.projector is None else self.repa.block
    outputs = apply(inputs, block, method="velocity_batches")
    losses = [flow.flow_loss(v, rows.latents, rows.noise) for (v, _), (_, rows) in zip(outputs, batches, strict=True)]
    return list(zip(losses, saturations, [features for _, features in outputs], strict=True))

  def _alignment(self, params: Params, features: jax.Array, teacher: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Returns the loss of REPA [b], from features of the decoder [b, n, width] and of the teacher [b, m, d].

    Latents of a square shape have a square grid of the teacher, others one in proportion to that of image_size. Called
    once for the rows of all buckets: the projector is read, and its gradient summed, only once.
    """
    height, width = (side // self.model.decoder.patch_size for side in shape)
    grid = None  # square
    if height != width:
      grid = repa_ops.scaled_grid(self.repa_grid, self.image_size // self.model.downscale, shape)
    teacher = repa_ops.resize_features(jax.lax.stop_gradient(teacher), height, width, grid)
    return repa_ops.alignment_loss(self.projector.apply({"params": params["repa"]}, features), teacher)

  def activation_bytes(self, rows: float, maps: Maps, images: bool) -> float:
    """See Stage. A group that devices share counts for each as a whole, more than its padded rows."""
    group_rows = self.tokens.bucket_rows
    rows = math.ceil(rows / group_rows) * group_rows if self.fast else rows
    total = largest = 0.0
    for first, end, length in self._buckets(group_rows):
      saved, working = self._bucket_bytes(length, maps)
      total, largest = total + (end - first) * saved, max(largest, (end - first) * working)
    encoded = of_frozen_vae(self.model.vae, self.image_size) if images and self.model.vae else 0.0
    return rows * max(self.runs * (total + largest) / group_rows, encoded)

  def _bucket_bytes(self, length: int, maps: Maps) -> tuple[float, float]:
    """Returns what a row of `length` registers saves, and what the backward pass of one of its blocks needs."""
    costs = [self._part_bytes(self.model.decoder, length or 1, maps(False))]
    if length and "encoder" in self.trained_parts:
      costs.append(self._part_bytes(self.model.encoder, length, maps(True)))
    return sum(saved for saved, _ in costs), max(working for _, working in costs)

  def _part_bytes(self, part: PatchTransformer, registers: int, maps: bool) -> tuple[float, float]:
    tokens = self._row_tokens(part, registers)
    saved, working = of_blocks(part.choices, part.depth, part.remat, tokens, tokens, maps)
    if isinstance(part, Decoder):  # modulations and their gradient
      sets = 2 if part.modulation == "per_segment" else 1
      saved += 2 * 6 * sets * part.depth * part.width * part.dtype.itemsize
    return saved, working

  @property
  def predict_fns(self) -> dict[str, Callable]:
    """tokenize(params, images, num_tokens) -> ids [b, num_tokens], by default all registers.

    detokenize(params, ids, keep_k [b], keys [b], size) -> images [b, H, W, 3] in [-1, 1], of size (H, W), by default
    image_size; faster for fewer ids (see sample_latents).
    """

    def tokenize(params, images, num_tokens=None):
      return self.model.apply({"params": params}, images, num_tokens, method="tokenize")

    def detokenize(params, token_ids, keep_k, keys, size=None):
      shape = self.model.latent_shape(*(size or (self.image_size, self.image_size)))
      noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
      latents = sample_latents(self.model, params, token_ids, keep_k, noise, self.sampler, self.fast)
      return jnp.clip(self.model.apply({"params": params}, latents, method="decode_latents"), -1, 1)

    return {"tokenize": tokenize, "detokenize": detokenize}
