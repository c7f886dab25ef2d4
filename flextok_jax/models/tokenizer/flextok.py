"""The tokenizer: VAE, encoder, FSQ and flow decoder, and the sampler of the flow."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.config.ranges import MAX_STEPS
from flextok_jax.core.errors import quote
from flextok_jax.core.images import to_float
from flextok_jax.models.tokenizer.decoder import Decoder, Inputs
from flextok_jax.models.tokenizer.encoder import Encoder
from flextok_jax.models.vae import tiling
from flextok_jax.models.vae.autoencoder import AutoencoderKL, sample_posterior
from flextok_jax.ops import flow, fsq, guidance

# Up to this number of codes, the conditional and the unconditional half run in one call: the superfluous registers of
# the unconditional half cost less than a second, smaller call. On a CPU both take equally long at 8; at 16 two calls
# are faster.
MAX_JOINT_CODES = 8
State = tuple[jax.Array, jax.Array]  # of the sampler: latents, and what guidance remembers [b, h, w, c]


class FlexTok(nn.Module):
  """Images to ordered discrete tokens and back (arXiv 2502.13967).

  Without a VAE (vae=None), latents are the scaled image itself: the pixel-space variant for tiny models. Without
  encoder and decoder it is only a VAE, with latents but no tokens.
  """

  encoder: Encoder | Any  # None: only a VAE
  decoder: Decoder | Any
  levels: Sequence[int]
  vae: AutoencoderKL | None = None
  scaling_factor: float = 1.0  # latents = scaling_factor * VAE latents (or image)
  base_side: float = 0.0  # latents per side whose times are not shifted, see t_shift; 0: none are
  tile: int = 0  # pixels per side above which the VAE works in tiles (models/vae/tiling.py); 0: never

  @property
  def num_registers(self) -> int:
    return self.encoder.num_registers

  @property
  def downscale(self) -> int:
    """Image pixels per latent pixel, along each side."""
    return 1 if self.vae is None else self.vae.downscale

  @property
  def patch_multiple(self) -> int:
    """Pixels whose multiples are sides of images that both encoder and decoder can cut into patches."""
    return self.downscale * math.lcm(*(part.patch_size for part in (self.encoder, self.decoder) if part is not None))

  def t_shift(self, height: int, width: int) -> float:
    """Returns the shift of the times (flow.shift_t) of height x width latents: sqrt(n / n_0) (Esser et al. 2024)."""
    return math.sqrt(height * width) / self.base_side if self.base_side else 1.0

  def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the latents of an image of height x width pixels."""
    channels = 3 if self.vae is None else self.vae.latent_channels
    return height // self.downscale, width // self.downscale, channels

  def encode_latents(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """images uint8 or float [b, H, W, 3] -> latents [b, h, w, c]: the mode of the posterior, or with a key a sample."""
    images = to_float(images)
    if self.vae is None:
      return self.scaling_factor * images
    in_tiles = self._in_tiles(images.shape[1:3])
    mean, logvar = tiling.encode(self.vae, images, self.tile) if in_tiles else self.vae.encode(images)
    latents = mean if key is None else sample_posterior(mean, logvar, key)
    return self.scaling_factor * latents.astype(jnp.float32)

  def decode_latents(self, latents: jax.Array) -> jax.Array:
    """latents [b, h, w, c] -> images float32 [b, H, W, 3], about [-1, 1] and not clipped."""
    latents = latents / self.scaling_factor
    if self.vae is None:
      return latents
    height, width = (side * self.downscale for side in latents.shape[1:3])
    return tiling.decode(self.vae, latents, self.tile) if self._in_tiles((height, width)) else self.vae.decode(latents)

  def _in_tiles(self, size: Sequence[int]) -> bool:
    return 0 < self.tile < max(size) and not self.is_initializing()

  def encode_registers(self, latents: jax.Array, num_tokens: int | None = None) -> jax.Array:
    """latents [b, h, w, c] -> vectors to be quantised by FSQ, [b, num_tokens, len(levels)]."""
    return self.encode_batches([(latents, num_tokens)])[0]

  def encode_batches(self, batches: Sequence[tuple[jax.Array, int | None]]) -> list[jax.Array]:
    """As encode_registers for several (latents, num_tokens)."""
    return self.encoder(batches)

  def encode(self, latents: jax.Array, num_tokens: int | None = None) -> jax.Array:
    """latents [b, h, w, c] -> codes [b, num_tokens, len(levels)] in [-1, 1], with straight-through gradients."""
    return fsq.quantize(self.encode_registers(latents, num_tokens), self.levels)

  def features(self, images: jax.Array, what: str, num_tokens: int | None = None) -> jax.Array:
    """Encodes images [b, H, W, 3] as features, float32.

    Args:
      images: [b, H, W, 3].
      what: "registers" or "patches" (see Encoder), or "codes" (see encode).
      num_tokens: how many of the first registers or codes; None: all.

    Returns:
      Registers [b, num_tokens, width], patches [b, h/p * w/p, width], or codes [b, num_tokens, len(levels)].
    """
    latents = self.encode_latents(images)
    if what == "codes":
      return self.encode(latents, num_tokens)
    return self.encoder([(latents, num_tokens)], what)[0].astype(jnp.float32)

  def velocity(self, *args: Any, **kwargs: Any) -> jax.Array:
    """Returns the velocity [b, h, w, c]; arguments as for Inputs of the decoder."""
    return self.velocity_batches([Inputs(*args, **kwargs)])[0][0]

  def velocity_batches(
    self, batches: Sequence[Inputs], feature_block: int | None = None
  ) -> list[tuple[jax.Array, jax.Array | None]]:
    """See Decoder."""
    return self.decoder(batches, feature_block)

  def modulations(self, t: jax.Array, interval: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """See Decoder."""
    return self.decoder.modulations(t, interval)

  def tokenize(self, images: jax.Array, num_tokens: int | None = None, key: jax.Array | None = None) -> jax.Array:
    """images [b, H, W, 3] -> token_ids int32 [b, num_tokens]."""
    return fsq.codes_to_ids(self.encode(self.encode_latents(images, key), num_tokens), self.levels)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Uses every parameter; for initialisation."""
    latents = self.encode_latents(images)
    batch = latents.shape[0]
    codes = self.encode(latents)
    keep_k = jnp.full(batch, self.num_registers, jnp.int32)
    v = self.velocity(latents, jnp.zeros(batch, jnp.float32), codes, keep_k, jnp.zeros(batch, bool))
    return self.decode_latents(v)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["guidance_scale"],
  meta_fields=["num_steps", "guidance", "guidance_interval", "apg_momentum", "apg_eta", "apg_threshold"],
)
@dataclasses.dataclass(frozen=True)
class Sampler:
  """Settings of sample_latents; `Sampler(**config.sampler)` are those of a config, which explains each.

  A pytree whose only leaf is guidance_scale: an argument of jax.jit, it needs no new program for another scale.
  Hashable where the scale is a number.

  Attributes:
    num_steps: Euler steps.
    guidance: "apg", "cfg" or "none".
    guidance_scale: a number, or one for each step [num_steps]. At the number 1 there is no unconditional pass.
    guidance_interval: times t at which guidance is applied; the other steps have no unconditional pass. They are those
      of steps of equal length, also if the model shifts its times (FlexTok.t_shift).
    apg_momentum: see guidance.apg, as for apg_eta and apg_threshold.

  Raises:
    ValueError: naming the value that is not possible.
  """

  num_steps: int
  guidance: str
  guidance_scale: float | jax.Array
  guidance_interval: tuple[float, float]
  apg_momentum: float
  apg_eta: float
  apg_threshold: float

  def __post_init__(self) -> None:
    steps = self.num_steps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= MAX_STEPS:
      raise ValueError(f"num_steps={quote(steps)} must be a whole number from 1 to {MAX_STEPS}")
    guidance.check_mode(self.guidance)
    object.__setattr__(self, "num_steps", int(steps))
    object.__setattr__(self, "guidance_interval", guidance.check_interval(self.guidance_interval))
    for name in ("apg_momentum", "apg_eta", "apg_threshold"):
      value = getattr(self, name)
      if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={quote(value)} must be a finite number")

  def chunks(self, size: int) -> Iterator[tuple[int, int, bool]]:
    """Yields all steps as (first, end, guided): at most `size` of them, with or without an unconditional pass."""
    scale = self.guidance_scale
    off = self.guidance == "none" or (isinstance(scale, int | float) and scale == 1)
    first, end = (0, 0) if off else guidance.guided_steps(self.num_steps, self.guidance_interval)
    for low, high, guided in ((0, first, False), (first, end, True), (end, self.num_steps, False)):
      for start in range(low, high, size):
        yield start, min(start + size, high), guided


def sample_latents(
  model: FlexTok,
  params: Any,
  token_ids: jax.Array,
  keep_k: jax.Array,
  noise: jax.Array,
  sampler: Sampler,
  fast: bool = True,
) -> jax.Array:
  """Decodes token ids to latents by guided Euler steps of the flow; to be jitted by the caller.

  The fast path computes the modulations of all steps at once. It merges masked registers if token_ids has fewer columns
  than the model has registers, and all registers of the unconditional half.

  Args:
    model: with encoder and decoder.
    params: of the model.
    token_ids: int [b, n]; those at or past keep_k have no effect. If n < num_registers, n must exceed keep_k (see
      nested.padded_length).
    keep_k: int [b].
    noise: starting latents [b, h, w, c].
    sampler: steps and guidance.
    fast: False for the slow reference implementation.

  Returns:
    latents [b, h, w, c] float32.
  """
  step = functools.partial(sample_steps, model, params, token_ids, keep_k)
  return sample_in_chunks(step, noise, sampler, sampler.num_steps, fast)


def sample_in_chunks(
  step: Callable[..., State], noise: jax.Array, sampler: Sampler, size: int, fast: bool
) -> jax.Array:
  """Returns latents [b, h, w, c]: takes all steps of a sampler, at most `size` in each call of step.

  Args:
    step: sample_steps with its first four arguments.
    noise: starting latents [b, h, w, c].
    sampler: steps and guidance.
    size: most steps in a call.
    fast: see sample_latents.
  """
  noise = noise.astype(jnp.float32)
  times, state = flow.step_times(sampler.num_steps), (noise, jnp.zeros_like(noise))
  scales = jnp.broadcast_to(jnp.asarray(sampler.guidance_scale, jnp.float32), times.shape)
  for first, end, guided in sampler.chunks(size):
    state = step(state, times[first:end], scales[first:end], sampler, guided=guided, fast=fast)
  return state[0]


def sample_steps(
  model: FlexTok,
  params: Any,
  token_ids: jax.Array,
  keep_k: jax.Array,
  state: State,
  times: jax.Array | np.ndarray,
  scales: jax.Array,
  sampler: Sampler,
  guided: bool,
  fast: bool,
) -> State:
  """Takes some steps of sample_latents.

  Args:
    model: see sample_latents, as for params, token_ids, keep_k and fast.
    state: latents and running sum of directions (guidance.apg), [b, h, w, c] each, before these steps.
    times: of these steps, float32 [s], before the model shifts them.
    scales: of guidance, float32 [s].
    sampler: number of all steps and kind of guidance.
    guided: whether these steps have an unconditional pass.

  Returns:
    The state after these steps.
  """
  if not fast:
    token_ids = jnp.pad(token_ids, ((0, 0), (0, model.num_registers - token_ids.shape[1])))
  codes = fsq.ids_to_codes(token_ids, model.levels)
  return _steps(model, params, codes, keep_k, state, times, scales, sampler, guided, fast)[0]


def sample_path(
  model: FlexTok, params: Any, codes: jax.Array, keep_k: jax.Array, noise: jax.Array, sampler: Sampler, fast: bool
) -> jax.Array:
  """Returns the latents before each step of sample_latents and after the last, float32 [num_steps + 1, b, h, w, c].

  Args:
    codes: of the token ids [b, n, code_dim]; if not `fast`, n is num_registers.
    model: see sample_latents, as for params, keep_k, noise, sampler and fast.
  """
  paths = []

  def step(*args: Any, **options: Any) -> State:
    state, path = _steps(model, params, codes, keep_k, *args, **options)
    paths.append(path)
    return state

  end = sample_in_chunks(step, noise, sampler, sampler.num_steps, fast)
  return jnp.concatenate([*paths, end[None]])


def _steps(
  model: FlexTok,
  params: Any,
  codes: jax.Array,
  keep_k: jax.Array,
  state: State,
  times: jax.Array | np.ndarray,
  scales: jax.Array,
  sampler: Sampler,
  guided: bool,
  fast: bool,
) -> tuple[State, jax.Array]:
  """See sample_steps; also returns the latents before each step [s, b, h, w, c]."""
  batch, num_codes = codes.shape[:2]
  shift, lengths = model.t_shift(*state[0].shape[1:3]), None
  if shift != 1:
    ends = flow.shift_t(times - np.float32(1 / sampler.num_steps), shift)
    times = flow.shift_t(times, shift)
    lengths = times - ends
  intervals = jnp.full_like(times, 1 / sampler.num_steps) if model.decoder.interval else None
  keep, drop = jnp.zeros(batch, bool), jnp.ones(batch, bool)  # values of drop_condition
  joint = not fast or num_codes <= MAX_JOINT_CODES

  def velocity(x, t, codes, keep_k, drop, modulations):
    t = jnp.full(x.shape[0], t, jnp.float32)
    args = x, t, codes, keep_k, drop, modulations
    interval = None if intervals is None or fast else jnp.full_like(t, 1 / sampler.num_steps)
    return model.apply({"params": params}, *args, interval=interval, method="velocity")

  def conditional_fn(x, t, running, inputs):
    return velocity(x, t, codes, keep_k, keep, inputs[1]), running

  def guided_fn(x, t, running, inputs):
    scale, modulations = inputs
    if joint:  # [b, ...] -> [2 b, ...], conditional half first
      twice = [jnp.concatenate([a, a]) for a in (x, codes, keep_k)]
      both = velocity(twice[0], t, *twice[1:], jnp.concatenate([keep, drop]), modulations)
      v_c, v_u = jnp.split(both, 2)
    else:
      v_c = velocity(x, t, codes, keep_k, keep, modulations)
      v_u = velocity(x, t, codes[:, :1], keep_k, drop, modulations)  # one null token stands for all registers
    if sampler.guidance == "cfg":
      return guidance.cfg(v_c, v_u, scale), running
    return guidance.apg(v_c, v_u, scale, running, sampler.apg_momentum, sampler.apg_eta, sampler.apg_threshold)

  modulations = None
  if fast:  # [s, ..., 1, f]: those of each step for a batch of one, shared by all samples
    blocks, head = cast(Any, model.apply({"params": params}, times, intervals, method="modulations"))
    modulations = (blocks.swapaxes(0, 1)[:, :, None], head if head is None else head[:, None])
  x, running = state
  velocity_fn = guided_fn if guided else conditional_fn
  inputs = scales, modulations
  x, running, path = flow.euler_steps(velocity_fn, x, sampler.num_steps, times, running, inputs, lengths)
  return (x, running), path
