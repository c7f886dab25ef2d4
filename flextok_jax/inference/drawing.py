"""The compiled functions of a generator, which ARGenerator calls with arguments that it has checked."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np

from flextok_jax.inference import priors
from flextok_jax.inference.conditions import Text
from flextok_jax.inference.validation import Array
from flextok_jax.models.ar import sampling
from flextok_jax.models.ar.generator import Generator
from flextok_jax.stages.ar import make_generator

if TYPE_CHECKING:
  from flextok_jax.inference.generator import ARGenerator


def draw_ids(
  gen: ARGenerator,
  keys: jax.Array,
  labels: Array,
  text: Text | None,
  null_text: Text | None,
  num_tokens: int,
  sampler: sampling.TokenSampler,
) -> jax.Array:
  """ARGenerator.generate without its checks: keys and labels [b], whose b may also be a symbol of jax.export.

  Args:
    gen: the generator.
    keys: one for each sample.
    labels: classes, -1 for none.
    text: features [b, t, f] and lengths [b]; None for models without text.
    null_text: features [1 or b, t, f] and lengths of the empty text; None without guidance.
    num_tokens: length of the result.
    sampler: how tokens are drawn.

  Returns:
    int32 [b, num_tokens].
  """
  prefix = jnp.zeros((keys.shape[0], 0), jnp.int32)
  length = sampling.padded_length(num_tokens, gen.num_tokens)
  args = keys, labels, text, null_text, prefix, np.int32(num_tokens), sampler
  return generate(gen, *args, length=length, fast=True)[0][:, :num_tokens]


@functools.lru_cache(maxsize=32)
def network(config: FrozenConfigDict) -> Generator:
  """Returns the network of a config, one for all its users."""
  return make_generator(config)


def _apply(gen: ARGenerator, function: Any, *args: Any, **kwargs: Any) -> Any:
  # float32 means float32: accelerators multiply in fewer bits by default, and a token may flip.
  with jax.default_matmul_precision("highest" if gen.config.dtype == "float32" else None):
    return function(*args, **kwargs)


@jax.jit
def encode_text_ids(gen: ARGenerator, text_ids: jax.Array, text_lengths: jax.Array) -> jax.Array:
  """Returns the features of captions, by the text encoder in the model: ids [b, t], lengths [b] -> [b, t, f]."""
  return _apply(gen, network(gen.config).apply, {"params": gen.params}, text_ids, text_lengths, method="encode_text")


@jax.jit
def logits(gen: ARGenerator, ids: jax.Array, labels: Array, text: Text | None) -> jax.Array:
  """ARGenerator.logits without its checks."""
  return _apply(gen, network(gen.config).apply, {"params": gen.params}, ids, labels, *(text or (None, None)))


@functools.partial(jax.jit, static_argnames=("length", "fast"))
def generate(
  gen: ARGenerator,
  keys: jax.Array,
  labels: jax.Array,
  text: Text | None,
  null_text: Text | None,
  prefix: jax.Array,
  num_tokens: jax.Array,
  sampler: sampling.TokenSampler,
  *,
  length: int,
  fast: bool,
) -> tuple[jax.Array, jax.Array]:
  """See sampling.generate: ids and log-probabilities [b, length]. null_text is that of the unconditional half."""
  if sampler.guidance_scale is not None:
    labels = jnp.concatenate([labels, jnp.full_like(labels, -1)])  # [2 b]
    text = None if text is None or null_text is None else priors.join_texts(text, null_text)
  features, lengths = text or (None, None)
  args = keys, labels, features, lengths, prefix, num_tokens, sampler
  return _apply(gen, sampling.generate, network(gen.config), gen.params, *args, length=length, fast=fast)
