"""Rectified flow (Liu et al. 2022; Esser et al. 2024): x_t = (1 - t) x0 + t noise, velocity = noise - x0."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

T_SAMPLINGS = ("logit_normal", "stratified_logit_normal", "uniform", "mode")


def t_from_draw(draw: jax.Array, mode: str, mode_scale: float) -> jax.Array:
  """Maps a draw [b] (normal for "logit_normal", else uniform in [0, 1)) to times [b] in [0, 1].

  "logit_normal": sigmoid(n). "stratified_logit_normal": the same distribution, sample i in the i-th of b equal strata.
  "mode": 1 - u - s (cos^2(pi u / 2) - 1 + u) with s = mode_scale (Esser et al. 2024, eq. 20).
  """
  if mode == "logit_normal":
    return jax.nn.sigmoid(draw)
  if mode == "stratified_logit_normal":
    quantile = (jnp.arange(draw.shape[0], dtype=draw.dtype) + draw) / draw.shape[0]
    # A quantile that rounds to 0 or 1 has an infinite normal deviate, whose sigmoid is 0 or 1.
    return jax.nn.sigmoid(math.sqrt(2) * jax.lax.erf_inv(2 * quantile - 1))
  if mode == "uniform":
    return draw
  if mode == "mode":
    return 1 - draw - mode_scale * (jnp.cos(jnp.pi / 2 * draw) ** 2 - 1 + draw)
  raise ValueError(f"unknown t sampling {mode!r}: one of {', '.join(T_SAMPLINGS)}")


def shift_t(t: Any, shift: float) -> Any:
  """Shifts times towards noise for shift > 1: shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23)."""
  return shift * t / (1 + (shift - 1) * t)


def sample_t(key: jax.Array, batch: int, mode: str, mode_scale: float, shift: float = 1.0) -> jax.Array:
  """Draws training times [batch] in [0, 1], float32."""
  draw = (jax.random.normal if mode == "logit_normal" else jax.random.uniform)(key, (batch,), jnp.float32)
  return shift_t(t_from_draw(draw, mode, mode_scale), shift)


def add_noise(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """Returns x_t [b, ...] for times t [b]."""
  t = t.reshape(t.shape + (1,) * (x0.ndim - 1))
  return (1 - t) * x0 + t * noise


def flow_loss(velocity: jax.Array, x0: jax.Array, noise: jax.Array) -> jax.Array:
  """Returns the mean squared error against noise - x0 per sample, float32 [b]."""
  error = velocity.astype(jnp.float32) - (noise - x0)
  return jnp.square(error).mean(range(1, error.ndim))


def euler_steps(
  velocity_fn: Callable[[jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]],
  x: jax.Array,
  num_steps: int,
  times: jax.Array | np.ndarray,
  carry: Any,
  inputs: Any,
  lengths: jax.Array | np.ndarray | None = None,
) -> tuple[jax.Array, Any, jax.Array]:
  """Takes Euler steps from noise (t = 1) towards data (t = 0): x <- x - v(x, t) / N for t = i / N, i = N..1.

  Args:
    velocity_fn: (x [b, ...], t [], carry, inputs of the step) -> (velocity [b, ...], carry).
    x: [b, ...] before the first of these steps.
    num_steps: N.
    times: of the steps to take, float32 [s], a part of step_times(N).
    carry: what guidance remembers between steps.
    inputs: tree of arrays [s, ...], of each step.
    lengths: of the steps in time, float32 [s]; None: 1 / N each.

  Returns:
    x [b, ...] float32 after these steps, the carry, and x before each step [s, b, ...].
  """

  def step(state, scanned):
    (x, carry), (t, length, inputs) = state, scanned
    velocity, carry = velocity_fn(x, t, carry, inputs)
    velocity = velocity.astype(jnp.float32)
    return (x - (velocity / num_steps if length is None else velocity * length), carry), x

  (x, carry), path = jax.lax.scan(step, (x.astype(jnp.float32), carry), (times, lengths, inputs))
  return x, carry, path


def on_path(path: jax.Array, t: jax.Array) -> jax.Array:
  """Returns the points of Euler paths at any times: between two steps a path is a straight line.

  Args:
    path: [n + 1, b, ...], x at the times 1, 1 - 1 / n, ..., 0.
    t: times [b] in [0, 1].

  Returns:
    x [b, ...].
  """
  position = (1 - t) * (path.shape[0] - 1)
  index = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, path.shape[0] - 2)
  share = (position - index).reshape(-1, *[1] * (path.ndim - 2))
  rows = jnp.arange(path.shape[1])
  return path[index, rows] * (1 - share) + path[index + 1, rows] * share


def step_times(num_steps: int) -> np.ndarray:
  """Returns the times of the sampler's steps, float32 [num_steps], from 1 down to 1 / num_steps."""
  return np.arange(num_steps, 0, -1, dtype=np.float32) / np.float32(num_steps)
