"""Positions and features of time."""

import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.ops import posemb


def test_positions_are_distinct():
  table = np.asarray(posemb.sincos_2d(16, 16, 32)).reshape(256, 32)
  distances = np.linalg.norm(table[:, None] - table[None], axis=-1)
  assert distances[~np.eye(256, dtype=bool)].min() > 0.5
  np.testing.assert_array_equal(posemb.sincos_2d(4, 4, 8)[0, 0], [0, 0, 1, 1, 0, 0, 1, 1])
  np.testing.assert_array_equal(posemb.sincos_2d(5, 3, 16), posemb.sincos_2d(9, 7, 16)[:5, :3])
  with pytest.raises(ValueError, match="multiple of 4, got 6"):
    posemb.sincos_2d(2, 2, 6)


def test_time_features():
  t = np.linspace(0, 1, 300, dtype=np.float32)
  features = np.asarray(posemb.timestep_features(t, 64), np.float64)
  cos, sin = features[:, :32], features[:, 32:]
  np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
  np.testing.assert_array_equal(features[0], [1] * 32 + [0] * 32)
  # From 1000 radians a unit of time down to 1000 / 256 almost, in equal ratios.
  slopes = np.asarray(posemb.timestep_features(jnp.array([1e-5]), 64), np.float64)[0, 32:] / 1e-5
  np.testing.assert_allclose(slopes, 1000 * 256 ** (-np.arange(32) / 32), rtol=1e-4)
  assert posemb.timestep_features(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
