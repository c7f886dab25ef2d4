"""Classifier-free and adaptive projected guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.ops import guidance


def normals(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(name="v")
def velocities():
  return normals(4, 6, 5, 3), normals(4, 6, 5, 3, seed=1)


def dots(a, b):
  """Scalar products of samples, in float64."""
  return (np.float64(a) * np.float64(b)).reshape(len(a), -1).sum(1)


def test_scale_one_is_the_conditional_velocity(v):
  v_c, v_u = v
  np.testing.assert_allclose(guidance.cfg(v_c, v_u, 1.0), v_c, atol=1e-6)
  np.testing.assert_array_equal(guidance.apg(v_c, v_u, 1.0, jnp.zeros_like(v_c))[0], v_c)
  np.testing.assert_array_equal(guidance.cfg(v_c, v_u, 0.0), v_u)
  # Equal velocities have no direction of guidance.
  np.testing.assert_allclose(guidance.apg(v_c, v_c, 9.0, jnp.zeros_like(v_c))[0], v_c, atol=1e-6)


def test_apg_with_everything_off_is_cfg(v):
  v_c, v_u = v
  running = jnp.zeros_like(v_c)
  for _ in range(3):  # without momentum the running sum forgets
    out, running = guidance.apg(v_c, v_u, 4.0, running, momentum=0.0, eta=1.0, threshold=0.0)
    np.testing.assert_allclose(out, guidance.cfg(v_c, v_u, 4.0), atol=1e-5)


def test_apg_moves_across_the_conditional_velocity_by_a_bounded_length(v):
  v_c, v_u = v
  out, running = guidance.apg(v_c, v_u, 7.5, jnp.zeros_like(v_c), eta=0.0, threshold=2.5)
  moved = np.float64(out) - v_c
  lengths = np.sqrt(dots(moved, moved))
  assert (np.abs(dots(moved, v_c)) < 1e-5 * lengths * np.sqrt(dots(v_c, v_c))).all()
  # At most threshold * (scale - 1); the direction is longer than the threshold, so what is left is its projection.
  difference = np.float64(v_c) - v_u
  assert (np.sqrt(dots(difference, difference)) > 2.5).all()
  cosine = dots(difference, v_c) / np.sqrt(dots(difference, difference) * dots(v_c, v_c))
  np.testing.assert_allclose(lengths, 2.5 * 6.5 * np.sqrt(1 - cosine**2), rtol=1e-4)
  np.testing.assert_allclose(running, difference, atol=1e-6)  # unclipped
  # With eta = 1 the parallel part stays, and the length is the threshold itself.
  out, _ = guidance.apg(v_c, v_u, 7.5, jnp.zeros_like(v_c), eta=1.0, threshold=2.5)
  moved = np.float64(out) - v_c
  np.testing.assert_allclose(np.sqrt(dots(moved, moved)), 2.5 * 6.5, rtol=1e-4)


def test_apg_momentum_adds_up(v):
  v_c, v_u = v
  running = jnp.zeros_like(v_c)
  for _ in range(3):
    _, running = guidance.apg(v_c, v_u, 2.0, running, momentum=-0.5)
  np.testing.assert_allclose(running, (1 - 0.5 + 0.25) * (v_c - v_u), atol=1e-5)


def test_apg_treats_samples_independently_and_handles_zeros(v):
  v_c, v_u = v
  out, running = guidance.apg(v_c, v_u, 7.5, jnp.zeros_like(v_c))
  other_c, other_u = v_c.copy(), v_u.copy()
  other_c[1:], other_u[1:] = 100, -7
  again, _ = guidance.apg(other_c, other_u, 7.5, jnp.zeros_like(v_c))
  np.testing.assert_array_equal(out[0], again[0])
  zeros = jnp.zeros_like(v_c)
  for pair in ((zeros, zeros), (zeros, v_u), (v_c, zeros)):
    assert all(np.isfinite(x).all() for x in guidance.apg(*pair, 7.5, zeros))
