"""Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505), computed in float32.

A code is a vector of len(levels) scalars in [-1, 1]; there are prod(levels) codes. In the id of a code, the first
scalar varies fastest.
"""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

FIRST_CODE = -1.0  # every scalar of the code of id 0
_EPS = 1e-3  # widens the bound slightly, so that the outermost levels are reached


def num_codes(levels: Sequence[int]) -> int:
  """Returns the size of the vocabulary: prod(levels)."""
  return math.prod(levels)


def _half(levels: Sequence[int]) -> jax.Array:
  return jnp.asarray([level // 2 for level in levels], jnp.float32)


def _basis(levels: Sequence[int]) -> jax.Array:
  return jnp.asarray([math.prod(levels[:i]) for i in range(len(levels))], jnp.int32)


def bound(z: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Squashes z [..., len(levels)] so that rounding yields `level` different integers per channel."""
  half = (jnp.asarray(levels, jnp.float32) - 1) * (1 + _EPS) / 2
  offset = jnp.asarray([0.5 * (level % 2 == 0) for level in levels], jnp.float32)
  shift = jnp.arctanh(offset / half)
  return jnp.tanh(z.astype(jnp.float32) + shift) * half - offset


def quantize(z: jax.Array, levels: Sequence[int], skip: jax.Array | None = None) -> jax.Array:
  """Rounds z [..., len(levels)] to codes in [-1, 1]; the gradient passes straight through the rounding.

  Where `skip`, bool [...], is True, the bounded value is not rounded; it lies at most 2e-3 outside of [-1, 1].
  """
  bounded = bound(z, levels)
  rounding = jnp.round(bounded) - bounded
  if skip is not None:
    rounding = jnp.where(skip[..., None], 0, rounding)
  return (bounded + jax.lax.stop_gradient(rounding)) / _half(levels)


def saturation(z: jax.Array, keep_k: jax.Array) -> jax.Array:
  """Returns how far z [b, k, d] lies outside of [-1, 1], where tanh is flat: mean square over the first keep_k, [b]."""
  outside = jnp.square(jax.nn.relu(jnp.abs(z.astype(jnp.float32)) - 1)).mean(2)
  kept = jnp.arange(z.shape[1], dtype=jnp.int32) < keep_k[:, None]
  return jnp.where(kept, outside, 0).sum(1) / keep_k


def sample_corruption(key: jax.Array, shape: Sequence[int], levels: Sequence[int], rate: float) -> jax.Array:
  """Draws int32 ids of `shape`, independently: with probability `rate` a uniform id, else -1 (no corruption)."""
  which, what = jax.random.split(key)
  ids = jax.random.randint(what, shape, 0, num_codes(levels), jnp.int32)
  return jnp.where(jax.random.bernoulli(which, np.float32(rate), shape), ids, -1)


def corrupt(codes: jax.Array, ids: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Replaces codes [..., len(levels)] with those of ids [...] where ids are not negative (see sample_corruption)."""
  return jnp.where(ids[..., None] < 0, codes, ids_to_codes(ids, levels))


def codes_to_ids(codes: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Maps codes [..., len(levels)] to ids [...] int32 in [0, prod(levels))."""
  half = _half(levels)
  digits = jnp.round(codes * half + half).astype(jnp.int32)
  return (digits * _basis(levels)).sum(-1, dtype=jnp.int32)


def ids_to_codes(ids: jax.Array, levels: Sequence[int]) -> jax.Array:
  """Maps ids [...] to codes [..., len(levels)] float32; the inverse of codes_to_ids."""
  digits = (ids.astype(jnp.int32)[..., None] // _basis(levels)) % jnp.asarray(levels, jnp.int32)
  half = _half(levels)
  return (digits.astype(jnp.float32) - half) / half
