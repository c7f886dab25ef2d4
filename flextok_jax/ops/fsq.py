"""Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505), computed in float32.

A code is a vector of len(levels) scalars in [-1, 1], one of prod(levels) in all; its id counts with the first level
fastest.
"""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

_EPS = 1e-3  # widens the bound a little so that the outermost level is reached


def num_codes(levels: Sequence[int]) -> int:
  """Returns the size of the vocabulary: prod(levels)."""
  return math.prod(levels)


def _half(levels: Sequence[int]) -> jax.Array:
  return jnp.asarray([level // 2 for level in levels], jnp.float32)


def _basis(levels: Sequence[int]) -> jax.Array:
  return jnp.asarray([math.prod(levels[:i]) for i in range(len(levels))], jnp.int32)


def bound(z: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Squashes z [..., len(levels)] so that rounding gives `level` integers per channel."""
  half = (jnp.asarray(levels, jnp.float32) - 1) * (1 + _EPS) / 2
  offset = jnp.asarray([0.5 * (level % 2 == 0) for level in levels], jnp.float32)
  shift = jnp.arctanh(offset / half)
  return jnp.tanh(z.astype(jnp.float32) + shift) * half - offset


def quantize(z: jax.Array, levels: Sequence[int], skip: jax.Array | None = None) -> jax.Array:
  """Rounds z [..., len(levels)] to codes in [-1, 1]; the gradient passes straight through the rounding.

  Where `skip`, bool [...], nothing is rounded: what the bound gives passes, at most 2e-3 outside of [-1, 1].
  """
  bounded = bound(z, levels)
  rounding = jnp.round(bounded) - bounded
  if skip is not None:
    rounding = jnp.where(skip[..., None], 0, rounding)
  return (bounded + jax.lax.stop_gradient(rounding)) / _half(levels)


def saturation(z: jax.Array, keep_k: jax.Array) -> jax.Array:
  """How far z [b, k, d] lies outside [-1, 1], squared, mean over the first keep_k [b]: there tanh is flat."""
  outside = jnp.square(jax.nn.relu(jnp.abs(z.astype(jnp.float32)) - 1)).mean(2)
  kept = jnp.arange(z.shape[1]) < keep_k[:, None]
  return jnp.where(kept, outside, 0).sum(1) / keep_k


def sample_corruption(key: jax.Array, shape: Sequence[int], levels: Sequence[int], share: float) -> jax.Array:
  """Draws which tokens are replaced and by what, each on its own: int32 shape, a uniform id with `share`, else -1."""
  which, what = jax.random.split(key)
  ids = jax.random.randint(what, shape, 0, num_codes(levels))
  return jnp.where(jax.random.bernoulli(which, share, shape), ids, -1)


def corrupt(codes: jax.Array, ids: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Replaces codes [..., len(levels)] by those of ids [...] where these are not negative (see sample_corruption)."""
  return jnp.where(ids[..., None] < 0, codes, ids_to_codes(ids, levels))


def codes_to_ids(codes: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Maps codes [..., len(levels)] to ids [...] int32 in [0, prod(levels))."""
  half = _half(levels)
  digits = jnp.round(codes * half + half).astype(jnp.int32)
  return (digits * _basis(levels)).sum(-1)


def ids_to_codes(ids: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Maps ids [...] to codes [..., len(levels)] float32; the inverse of codes_to_ids."""
  digits = (ids[..., None] // _basis(levels)) % jnp.asarray(levels, jnp.int32)
  half = _half(levels)
  return (digits - half) / half
