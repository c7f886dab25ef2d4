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


def quantize(z: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Rounds z [..., len(levels)] to codes in [-1, 1]; the gradient passes straight through the rounding."""
  bounded = bound(z, levels)
  rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
  return rounded / _half(levels)


def saturation(z: jax.Array, keep_k: jax.Array) -> jax.Array:
  """How far z [b, k, d] lies outside [-1, 1], squared, mean over the first keep_k [b]: there tanh is flat."""
  outside = jnp.square(jax.nn.relu(jnp.abs(z.astype(jnp.float32)) - 1)).mean(2)
  kept = jnp.arange(z.shape[1]) < keep_k[:, None]
  return jnp.where(kept, outside, 0).sum(1) / keep_k


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
