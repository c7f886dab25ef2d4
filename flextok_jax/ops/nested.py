"""Nested dropout (Rippel et al. 2014): only the first keep_k registers of a sample are kept."""

from collections.abc import Callable, Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.ops.attention import MASKED

_TINY = 1e-9  # far below any probability or weight here
MODES = ("uniform", "pow2", "uniform_pow2", "none")


def powers_of_two(num_registers: int) -> tuple[int, ...]:
  """Returns the powers of two up to num_registers, and num_registers itself."""
  return tuple(1 << i for i in range((num_registers - 1).bit_length())) + (num_registers,)


def check_mode(mode: str, num_registers: int) -> None:
  """Raises ValueError for an unknown mode, or for "pow2" if num_registers is not a power of two."""
  if mode not in MODES:
    raise ValueError(f"unknown nested_dropout {mode!r}: one of {', '.join(MODES)}")
  if mode == "pow2" and num_registers & (num_registers - 1):
    raise ValueError(f"nested_dropout 'pow2' needs a power of two, got {num_registers} registers; use 'uniform_pow2'")


def length_distribution(mode: str, num_registers: int) -> np.ndarray:
  """Returns the probabilities of keeping 1..num_registers registers, float64 [num_registers].

  "uniform": all lengths with equal probability. "pow2": all powers of two up to num_registers with equal probability.
  "uniform_pow2": a uniform length, rounded up to a power of two (at most num_registers), so about half of the samples
  keep all registers. "none": every sample keeps all.

  Raises:
    ValueError: as check_mode.
  """
  check_mode(mode, num_registers)
  k = np.arange(1, num_registers + 1)
  if mode == "none":
    return (k == num_registers).astype(np.float64)
  if mode == "uniform":
    return np.full(num_registers, 1 / num_registers)
  if mode == "pow2":
    powers = (k & (k - 1)) == 0
    return powers / powers.sum()
  rounded = np.minimum(1 << np.ceil(np.log2(k)).astype(int), num_registers)
  return np.bincount(rounded, minlength=num_registers + 1)[1:] / num_registers


def row_bounds(mode: str, num_registers: int, null_prob: float, rows: int) -> np.ndarray:
  """Returns the largest keep_k that sample_keep_k can draw for each row, int [rows]; 0: the row is always dropped."""
  high = (np.arange(rows) + 1) / rows
  quantile = np.clip((high - null_prob) / max(1 - null_prob, _TINY), 0, 1)
  cdf = np.cumsum(length_distribution(mode, num_registers))
  bound = np.minimum(1 + np.searchsorted(cdf, quantile - _TINY), num_registers)
  return np.where(high <= null_prob + _TINY, 0, bound)


def sample_keep_k(
  key: jax.Array, groups: int, rows: int, num_registers: int, mode: str, null_prob: float
) -> tuple[jax.Array, jax.Array]:
  """Draws (keep_k int32 [groups, rows] in 1..num_registers, drop bool [groups, rows]) by systematic sampling.

  In each group, row i is the quantile (i + u) / rows of the joint distribution: dropped with null_prob, else a length
  of length_distribution, in ascending order. A random row has exactly that distribution; row i has at most
  row_bounds[i] registers. The caller shuffles the contents of the rows.

  Raises:
    ValueError: as check_mode.
  """
  bounds = row_bounds(mode, num_registers, null_prob, rows)
  u = jax.random.uniform(key, (groups, 1), jnp.float32)
  point = (jnp.arange(rows, dtype=jnp.float32) + u) / rows
  quantile = (point - null_prob) / max(1 - null_prob, _TINY)
  cdf = jnp.asarray(np.cumsum(length_distribution(mode, num_registers)), jnp.float32)
  keep_k = 1 + jnp.searchsorted(cdf, quantile, side="right").astype(jnp.int32)
  # Clipped because a point may be rounded up to the end of its stratum.
  return jnp.clip(keep_k, 1, np.maximum(bounds, 1).astype(np.int32)), (point < null_prob) | (bounds == 0)


def padded_lengths(num_registers: int) -> tuple[int, ...]:
  """Returns the static lengths to which registers are padded: 8, 8 + powers of two from 8, and num_registers."""
  sizes = (8, *(8 + (1 << i) for i in range(3, num_registers.bit_length())))
  return (*(size for size in sizes if size < num_registers), num_registers)


def padded_length(keep_k: int, num_registers: int) -> int:
  """Returns the padded length for up to keep_k kept registers: they and a masked one fit, unless none is masked."""
  return next(size for size in padded_lengths(num_registers) if size > min(keep_k, num_registers - 1))


def merge_buckets(lengths: Sequence[int], cost: Callable[[int], float], overhead: float) -> list[tuple[int, int, int]]:
  """Divides rows of ascending padded lengths into buckets of one length each, at the least total cost.

  Args:
    lengths: of the rows; a row may run at any larger length, except that rows of length 0 stay by themselves.
    cost: of a row of a length.
    overhead: cost of a bucket.

  Returns:
    (first row, end, length) of each bucket.
  """
  best: list[tuple[float, list[tuple[int, int, int]]]] = [(0.0, [])]  # of the first rows
  for end in range(1, len(lengths) + 1):
    length = lengths[end - 1]
    row = cost(length)
    options = [
      (best[first][0] + (end - first) * row + overhead, [*best[first][1], (first, end, length)])
      for first in range(end)
      if bool(lengths[first]) == bool(length)
    ]
    best.append(min(options, key=lambda option: option[0]))
  return best[-1][1]


def key_log_counts(
  keep_k: jax.Array, drop: jax.Array, length: int, num_registers: int, single_null: bool = False, hide: bool = False
) -> jax.Array:
  """Returns how often each of `length` registers counts as a key of attention, as a logarithm, float32 [b, length].

  All num_registers - keep_k masked registers are the same vector at the input of the decoder, attention adds no
  position to them, and they share one modulation: they stay equal in every block. n equal keys weigh n exp(s) = exp(s +
  log n). So the registers past keep_k (at least one, unless none is masked) share the count of the masked ones. Where
  the condition is dropped, all registers are equal, and all share the count num_registers, or 1 with single_null.
  With `hide`, registers past keep_k are no keys at all.
  """
  masked = (num_registers - keep_k)[:, None].astype(jnp.float32) / jnp.maximum(length - keep_k, 1)[:, None]
  tail = jnp.arange(length, dtype=jnp.int32) >= keep_k[:, None]
  kept = jnp.where(tail, jnp.float32(MASKED) if hide else jnp.log(jnp.maximum(masked, _TINY)), 0.0)
  null = math.log((1 if single_null else num_registers) / length)
  return jnp.where(drop[:, None], null, kept)


def mask_tail(x: jax.Array, fill: jax.Array, keep_k: jax.Array) -> jax.Array:
  """Replaces positions >= keep_k with fill: x [b, l, d], fill [d], keep_k [b]."""
  keep = jnp.arange(x.shape[1], dtype=jnp.int32) < keep_k[:, None]
  return jnp.where(keep[..., None], x, fill)
