"""Nested dropout (Rippel et al. 2014): only the first keep_k registers of a sample are kept."""

import jax
import jax.numpy as jnp

MODES = ("uniform", "pow2", "uniform_pow2")


def lengths(num_registers: int) -> tuple[int, ...]:
  """Returns the powers of two up to num_registers, and num_registers itself."""
  return tuple(1 << i for i in range((num_registers - 1).bit_length())) + (num_registers,)


def check_mode(mode: str, num_registers: int):
  """Raises ValueError for an unknown mode, or for "pow2" with num_registers that is no power of two."""
  if mode not in MODES:
    raise ValueError(f"unknown tokens.nested_dropout {mode!r}: one of {', '.join(MODES)}")
  if mode == "pow2" and num_registers & (num_registers - 1):
    raise ValueError(f"nested dropout 'pow2' needs a power of two, got {num_registers} registers; use 'uniform_pow2'")


def sample_keep_k(key: jax.Array, batch: int, num_registers: int, mode: str) -> jax.Array:
  """Draws the number of kept registers, int32 [batch] in 1..num_registers.

  "uniform": every length alike. "pow2": every power of two up to num_registers alike. "uniform_pow2": a uniform length
  rounded up to a power of two (and to num_registers at most), so about half of the samples keep everything.

  Raises:
    ValueError: as check_mode.
  """
  check_mode(mode, num_registers)
  if mode == "pow2":
    return jnp.left_shift(1, jax.random.randint(key, (batch,), 0, num_registers.bit_length()))
  k = jax.random.randint(key, (batch,), 1, num_registers + 1)
  if mode == "uniform":
    return k
  return jnp.minimum(jnp.left_shift(1, 32 - jax.lax.clz(k - 1)), num_registers)  # up to the next power of two


def mask_tail(x: jax.Array, fill: jax.Array, keep_k: jax.Array) -> jax.Array:
  """Replaces positions >= keep_k by fill: x [b, l, d], fill [d], keep_k [b]."""
  keep = jnp.arange(x.shape[1]) < keep_k[:, None]
  return jnp.where(keep[..., None], x, fill)
