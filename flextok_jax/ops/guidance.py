"""Guidance: combines the conditional velocity v_c and the unconditional one v_u, both [b, ...] float32."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from flextok_jax.core.errors import quote

MODES = ("apg", "cfg", "none")


def check_mode(mode: str) -> None:
  """Raises ValueError if mode is not one of MODES."""
  if not isinstance(mode, str) or mode not in MODES:
    raise ValueError(f"unknown guidance {quote(mode)}: one of {', '.join(MODES)}")


def check_interval(interval: Any) -> tuple[float, float]:
  """Returns two times 0 <= low <= high <= 1; raises ValueError for anything else."""
  try:
    low, high = map(float, interval)
  except (TypeError, ValueError):
    low = high = math.nan
  if not 0 <= low <= high <= 1:
    raise ValueError(f"guidance_interval={quote(interval)} must be two times 0 <= low <= high <= 1")
  return low, high


def guided_steps(num_steps: int, interval: tuple[float, float]) -> tuple[int, int]:
  """Returns (first, end) of the steps i whose t = 1 - i / num_steps lies in interval (Kynkäänniemi et al. 2024)."""
  low, high = interval
  inside = [i for i in range(num_steps) if low - 1e-9 <= 1 - i / num_steps <= high + 1e-9]
  return (inside[0], inside[-1] + 1) if inside else (0, 0)


def cfg(v_c: jax.Array, v_u: jax.Array, scale: jax.Array | float) -> jax.Array:
  """Classifier-free guidance (Ho & Salimans 2022): v_u + scale (v_c - v_u)."""
  return v_u + scale * (v_c - v_u)


def apg(
  v_c: jax.Array,
  v_u: jax.Array,
  scale: jax.Array | float,
  running: jax.Array,
  momentum: float = -0.5,
  eta: float = 0.0,
  threshold: float = 2.5,
) -> tuple[jax.Array, jax.Array]:
  """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), per sample over all but the first axis.

  Args:
    v_c: conditional velocity [b, ...].
    v_u: unconditional velocity [b, ...].
    scale: guidance scale.
    running: running sum of directions [b, ...], zeros at first.
    momentum: factor of the running sum.
    eta: factor of the part of the direction parallel to v_c.
    threshold: bound on the norm of the direction; 0: none.

  Returns:
    The guided velocity and the new running sum, which is not clipped.
  """
  axes = tuple(range(1, v_c.ndim))
  running = (v_c - v_u) + momentum * running
  direction = running
  if threshold > 0:
    norm = jnp.sqrt(jnp.square(direction).sum(axes, keepdims=True))
    direction = direction * jnp.minimum(1.0, threshold / jnp.maximum(norm, 1e-30))
  length = jnp.sqrt(jnp.square(v_c).sum(axes, keepdims=True))
  unit = v_c / jnp.maximum(length, 1e-12)
  parallel = (direction * unit).sum(axes, keepdims=True) * unit
  direction = direction - (1 - eta) * parallel
  return v_c + (scale - 1) * direction, running
