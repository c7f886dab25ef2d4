"""What a tokenizer computes: pure functions of the model and arrays, without checks, compiled once per shape."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from flextok_jax.config import TOKENIZER_STAGES
from flextok_jax.inference import adaptive, validation
from flextok_jax.inference.validation import Array
from flextok_jax.models import transformer
from flextok_jax.models.tokenizer import flextok
from flextok_jax.models.tokenizer.flextok import Sampler
from flextok_jax.ops import distances, fsq, nested
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.stages.vae import make_vae

if TYPE_CHECKING:
  from flextok_jax.inference.tokenizer import FlexTok

CHUNK_STEPS = 50  # of the sampler in one program


def slots(model: FlexTok, count: int) -> int:
  """Returns the number of registers to run if more than `count` are needed: one of a few, to compile few programs."""
  total = model.num_registers
  return nested.padded_length(count, total) if model.config.fast else total


@functools.lru_cache(maxsize=32)
def make_network(config: FrozenConfigDict) -> flextok.FlexTok:
  """Returns the network of a tokenizer's config, or of that of a VAE alone."""
  if config.stage in TOKENIZER_STAGES:
    return make_model(config)
  return flextok.FlexTok(None, None, (), make_vae(config), config.vae.scaling_factor, config.vae.tile)


def _precision(model: FlexTok) -> Any:
  # float32 means float32: accelerators multiply in fewer bits by default, and a token may flip.
  return jax.default_matmul_precision("highest" if model.config.dtype == "float32" else None)


def _apply(model: FlexTok, method: str, *args: Any) -> Any:
  with _precision(model):
    return make_network(model.config).apply({"params": model.params}, *args, method=method)


@functools.partial(jax.jit, static_argnames="shape")
def sample_noise(keys: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """Draws starting latents [b, h, w, c], one per key [b]; shape is (h, w, c)."""
  return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


@functools.partial(jax.jit, static_argnames="num_tokens")
def tokenize(model: FlexTok, images: jax.Array, num_tokens: int, key: jax.Array | None) -> jax.Array:
  """Returns ids int32 [b, num_tokens] of images [b, h, w, 3]; key: of the posterior of a VAE, None for its mean."""
  return _apply(model, "tokenize", images, num_tokens, key)


@functools.partial(jax.jit, static_argnames=("what", "layer", "num_tokens"))
def features(model: FlexTok, images: jax.Array, what: str, layer: int, num_tokens: int) -> jax.Array:
  """Returns what FlexTok.features does, of images [b, h, w, 3], after `layer` blocks of the encoder."""
  network, encoder = make_network(model.config), model.params["encoder"]
  network = network.clone(encoder=network.encoder.clone(depth=layer))
  encoder = {**encoder, "transformer": transformer.first_blocks(encoder["transformer"], layer)}
  with _precision(model):
    variables = {"params": {**model.params, "encoder": encoder}}
    found: Any = network.apply(variables, images, what, num_tokens, method="features")
  return found


@jax.jit
def encode_latents(model: FlexTok, images: jax.Array, key: jax.Array | None) -> jax.Array:
  """Returns scaled latents [b, h, w, c] of images [b, h', w', 3]."""
  return _apply(model, "encode_latents", images, key)


@jax.jit
def decode_latents(model: FlexTok, z: jax.Array) -> jax.Array:
  """Returns images [b, h', w', 3] of scaled latents [b, h, w, c]."""
  return _apply(model, "decode_latents", z)


@jax.jit
def velocity(
  model: FlexTok, x_t: jax.Array, t: jax.Array, ids: jax.Array, keep_k: jax.Array, drop_condition: jax.Array
) -> jax.Array:
  """Returns the velocity [b, h, w, c] at noised latents x_t of that shape and times t [b]."""
  codes = fsq.ids_to_codes(ids, model.config.tokens.levels)
  return _apply(model, "velocity", x_t, t, codes, keep_k, drop_condition)


@jax.jit
def detokenize(model: FlexTok, ids: jax.Array, keep_k: jax.Array, noise: jax.Array, sampler: Sampler) -> jax.Array:
  """Returns images [b, h', w', 3] of ids [b, slots], by all steps of the sampler from noise [b, h, w, c]."""
  with _precision(model):
    network = make_network(model.config)
    latents = flextok.sample_latents(network, model.params, ids, keep_k, noise, sampler, model.config.fast)
  return _apply(model, "decode_latents", latents)


@functools.partial(jax.jit, static_argnames=("guided", "fast"))
def sample_steps(
  model: FlexTok,
  ids: jax.Array,
  keep_k: jax.Array,
  state: flextok.State,
  times: jax.Array,
  scales: jax.Array,
  sampler: Sampler,
  guided: bool,
  fast: bool,
) -> flextok.State:
  """Takes some of the sampler's steps; see models.tokenizer.flextok.sample_steps."""
  with _precision(model):
    network = make_network(model.config)
    return flextok.sample_steps(network, model.params, ids, keep_k, state, times, scales, sampler, guided, fast)


@functools.partial(jax.jit, static_argnames="metric")
def lengths(
  model: FlexTok,
  images: jax.Array,
  ids: jax.Array,
  noise: jax.Array,
  quality: jax.Array,
  metric: distances.Distance,
  sampler: Sampler,
) -> jax.Array:
  """Returns the length int32 [b] of the shortest prefix of each image's ids whose reconstruction is within quality."""

  def decode(ids: jax.Array, keep_k: jax.Array) -> jax.Array:
    ids = adaptive.pad_to_slots(ids, model.num_registers)
    return jnp.clip(detokenize(model, ids, keep_k, noise, sampler), -1, 1)

  return adaptive.shortest_length(decode, metric, images, ids, quality)


def decode(model: FlexTok, ids: Array, keep_k: Array, noise: Array, sampler: Sampler) -> jax.Array:
  """Detokenizes by one program; for many steps by several, waited for, so that Ctrl-C stops the process in between."""
  arguments = model, ids, keep_k, noise, sampler
  if sampler.num_steps <= CHUNK_STEPS or any(map(validation.is_traced, jax.tree.leaves(arguments))):
    return detokenize(*arguments)

  def step(state: flextok.State, *args: Any, **kwargs: Any) -> flextok.State:
    return jax.block_until_ready(sample_steps(model, ids, keep_k, state, *args, **kwargs))

  noise = jnp.asarray(noise, jnp.float32)
  return decode_latents(model, flextok.sample_in_chunks(step, noise, sampler, CHUNK_STEPS, model.config.fast))
