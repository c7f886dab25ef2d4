"""Nested dropout (Rippel et al. 2014): only the first keep_k registers of a sample are kept."""

import math

import jax
import jax.numpy as jnp
import numpy as np

_TINY = 1e-9  # far below any probability or weight here
MODES = ("uniform", "pow2", "uniform_pow2", "none")


def lengths(num_registers: int) -> tuple[int, ...]:
  """Returns the powers of two up to num_registers, and num_registers itself."""
  return tuple(1 << i for i in range((num_registers - 1).bit_length())) + (num_registers,)


def check_mode(mode: str, num_registers: int):
  """Raises ValueError for an unknown mode, or for "pow2" with num_registers that is no power of two."""
  if mode not in MODES:
    raise ValueError(f"unknown tokens.nested_dropout {mode!r}: one of {', '.join(MODES)}")
  if mode == "pow2" and num_registers & (num_registers - 1):
    raise ValueError(f"nested dropout 'pow2' needs a power of two, got {num_registers} registers; use 'uniform_pow2'")


def law(mode: str, num_registers: int) -> np.ndarray:
  """Returns the probabilities of keeping 1..num_registers registers, float64 [num_registers].

  "uniform": every length alike. "pow2": every power of two up to num_registers alike. "uniform_pow2": a uniform length
  rounded up to a power of two (and to num_registers at most), so about half of the samples keep everything. "none":
  every sample keeps everything.

  Raises:
    ValueError: as check_mode.
  """
  check_mode(mode, num_registers)
  k = np.arange(1, num_registers + 1)
  if mode == "none":
    return np.float64(k == num_registers)
  if mode == "uniform":
    return np.full(num_registers, 1 / num_registers)
  if mode == "pow2":
    powers = (k & (k - 1)) == 0
    return powers / powers.sum()
  rounded = np.minimum(1 << np.ceil(np.log2(k)).astype(int), num_registers)
  return np.bincount(rounded, minlength=num_registers + 1)[1:] / num_registers


def row_bounds(mode: str, num_registers: int, null_prob: float, rows: int) -> np.ndarray:
  """Returns the largest number of registers that sample_kept can give to each row, int [rows]; 0: always null."""
  high = (np.arange(rows) + 1) / rows
  share = np.clip((high - null_prob) / max(1 - null_prob, _TINY), 0, 1)
  cdf = np.cumsum(law(mode, num_registers))
  bound = np.minimum(1 + np.searchsorted(cdf, share - _TINY), num_registers)
  return np.where(high <= null_prob + _TINY, 0, bound)


def sample_kept(
  key: jax.Array, groups: int, rows: int, num_registers: int, mode: str, null_prob: float
) -> tuple[jax.Array, jax.Array]:
  """Draws (keep_k int32 [groups, rows] in 1..num_registers, drop bool [groups, rows]) by systematic sampling.

  In each group, row i takes the point (i + u) / rows of the joint law: null with null_prob, else a length of the mode's
  law, shorter ones first. A row drawn at random has exactly that law; row i alone has at most row_bounds[i] registers.
  Whoever uses the rows shuffles what stands in them.

  Raises:
    ValueError: as check_mode.
  """
  bounds = row_bounds(mode, num_registers, null_prob, rows)
  u = jax.random.uniform(key, (groups, 1))
  point = (jnp.arange(rows) + u) / rows
  share = (point - null_prob) / max(1 - null_prob, _TINY)
  cdf = jnp.asarray(np.cumsum(law(mode, num_registers)), jnp.float32)
  keep_k = 1 + jnp.searchsorted(cdf, share, side="right").astype(jnp.int32)
  # The clip is for rounding alone: a point may round up to the end of its stratum.
  return jnp.clip(keep_k, 1, np.maximum(bounds, 1)), (point < null_prob) | (bounds == 0)


def slot_sizes(num_registers: int) -> tuple[int, ...]:
  """Returns the few static lengths in which kept registers run: 8, powers of two and room for one more, all."""
  sizes = (8, *(8 + (1 << i) for i in range(3, num_registers.bit_length())))
  return (*(size for size in sizes if size < num_registers), num_registers)


def slots(keep_k: int, num_registers: int) -> int:
  """Returns the length to run for up to keep_k kept registers: room for them and for a masked one, if one is masked."""
  return next(size for size in slot_sizes(num_registers) if size > min(keep_k, num_registers - 1))


def key_weights(
  keep_k: jax.Array, drop: jax.Array, num_slots: int, num_registers: int, single_null: bool = False
) -> jax.Array:
  """Returns the weight of each slot as a key of attention, log of a count, float32 [b, num_slots].

  All num_registers - keep_k masked registers are the same vector at the decoder's input, have no position of their own
  and share one modulation: they stay equal through every block. n equal keys weigh n exp(s) = exp(s + log n). So the
  slots past keep_k (there must be one, unless none is masked) share that weight; where the condition is dropped all
  registers are equal and all slots share the weight of all, or of a single one.
  """
  masked = (num_registers - keep_k)[:, None] / jnp.maximum(num_slots - keep_k, 1)[:, None]
  tail = jnp.arange(num_slots) >= keep_k[:, None]
  kept = jnp.where(tail, jnp.log(jnp.maximum(masked, _TINY)), 0.0)
  null = math.log((1 if single_null else num_registers) / num_slots)
  return jnp.where(drop[:, None], null, kept)


def mask_tail(x: jax.Array, fill: jax.Array, keep_k: jax.Array) -> jax.Array:
  """Replaces positions >= keep_k by fill: x [b, l, d], fill [d], keep_k [b]."""
  keep = jnp.arange(x.shape[1]) < keep_k[:, None]
  return jnp.where(keep[..., None], x, fill)
