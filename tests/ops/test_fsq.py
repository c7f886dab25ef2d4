"""Finite scalar quantisation: codes, ids, gradients; its numbers are in tests/models/test_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.ops import fsq

LEVELS = (8, 8, 8, 5, 5, 5)


def normals(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_every_id_survives_the_round_trip():
  ids = jnp.arange(fsq.num_codes(LEVELS), dtype=jnp.int32)
  assert ids.size == 64_000
  codes = jax.jit(lambda x: fsq.ids_to_codes(x, LEVELS))(ids)
  assert codes.dtype == jnp.float32 and codes.min() == -1 and codes.max() == 1
  assert len(np.unique(codes, axis=0)) == 64_000
  again = jax.jit(lambda x: fsq.codes_to_ids(x, LEVELS))(codes)
  assert again.dtype == jnp.int32
  np.testing.assert_array_equal(again, ids)


@pytest.mark.parametrize("levels", [LEVELS, (8, 6, 5), (7, 5, 5, 5, 5), (2, 3, 4)])
def test_quantize_reaches_exactly_the_codes(levels):
  """An even level n lies on -n/2..n/2-1 and an odd one on -(n-1)/2..(n-1)/2, both divided by n // 2."""
  points = [(np.arange(level) - level // 2) / (level // 2) for level in levels]
  grid = np.stack(np.meshgrid(*points, indexing="ij"), -1).reshape(-1, len(levels))
  # bound() is monotonic in each channel: on a fine line each channel takes each of its values, once, in rising order.
  line = np.linspace(-8, 8, 4001, dtype=np.float32)
  codes = np.asarray(fsq.quantize(np.tile(line[:, None], len(levels)), levels))
  preimages = []
  for channel, expected in enumerate(points):
    assert (np.diff(codes[:, channel]) >= 0).all()
    np.testing.assert_array_equal(np.unique(codes[:, channel]), expected.astype(np.float32))
    middles = [line[codes[:, channel] == np.float32(value)] for value in expected]
    preimages.append([middle[len(middle) // 2] for middle in middles])
  z = np.stack(np.meshgrid(*preimages, indexing="ij"), -1).reshape(-1, len(levels))
  quantised = fsq.quantize(z, levels)
  np.testing.assert_array_equal(quantised, grid.astype(np.float32))
  ids = np.asarray(fsq.codes_to_ids(quantised, levels))
  assert sorted(ids.tolist()) == list(range(fsq.num_codes(levels)))
  np.testing.assert_array_equal(fsq.ids_to_codes(ids, levels), quantised)


def test_quantising_extremes_and_half_precision():
  z = jnp.array([[-jnp.inf] * 6, [jnp.inf] * 6, [-1e30] * 6, [1e30] * 6])
  codes = fsq.quantize(z, LEVELS)
  assert (codes[0] == -1).all() and (codes[2] == -1).all()
  np.testing.assert_array_equal(codes[1], np.float32([0.75, 0.75, 0.75, 1, 1, 1]))
  np.testing.assert_array_equal(codes[3], codes[1])
  z = jnp.asarray(normals(100, 6), jnp.bfloat16)
  np.testing.assert_array_equal(fsq.quantize(z, LEVELS), fsq.quantize(z.astype(jnp.float32), LEVELS))


def test_gradient_is_straight_through():
  """The gradient of quantize is that of the bound, divided by the half width; rounding has no gradient."""
  z, weights = 2 * normals(200, 6), normals(200, 6, seed=1)
  half = np.array([4, 4, 4, 2, 2, 2])
  grad = jax.grad(lambda z: (fsq.quantize(z, LEVELS) * weights).sum())(z)
  bound = jax.grad(lambda z: (fsq.bound(z, LEVELS) / half * weights).sum())(z)
  np.testing.assert_allclose(grad, bound, rtol=1e-6)
  assert (np.abs(grad) > 0).all()
  rounding = jax.grad(lambda z: (jnp.round(fsq.bound(z, LEVELS)) * weights).sum())(z)
  assert (rounding == 0).all()


def test_saturation_is_the_part_beyond_one():
  z = np.zeros((3, 2, 6), np.float32)
  z[1], z[2, 0, 0] = np.linspace(-1, 1, 6), -3
  np.testing.assert_allclose(fsq.saturation(z, jnp.array([2, 2, 2])), [0, 0, 4 / 12], rtol=1e-6)
  np.testing.assert_allclose(fsq.saturation(z, jnp.array([1, 1, 1])), [0, 0, 4 / 6], rtol=1e-6)  # of the kept ones only
  np.testing.assert_array_equal(fsq.saturation(z[:, ::-1], jnp.array([1, 1, 1])), [0, 0, 0])
