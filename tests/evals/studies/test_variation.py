"""Variation between decodes."""

import itertools

import numpy as np

from flextok_jax.evals.metrics import image
from flextok_jax.evals.studies import variation
from flextok_jax.parallel import sharding

RNG = np.random.default_rng(0)
MESH = sharding.make_mesh()


def pictures(*shape):
  return RNG.integers(0, 256, (*shape, 16, 16, 3)).astype(np.uint8)


def mse(a, b):
  return np.square((a.astype(float) - b) / 255).mean((-1, -2, -3))


def test_variation_is_the_mean_over_all_pairs():
  decoded = pictures(3, 4)
  compare = image.make_compare(image.make_metrics(["psnr", "mse"]), 2, MESH)
  found = variation.pairwise(compare, decoded)
  assert list(found) == ["psnr", "mse"]
  pairs = [mse(decoded[:, i], decoded[:, j]) for i, j in itertools.combinations(range(4), 2)]
  np.testing.assert_allclose(found["mse"], 4 * np.mean(pairs, 0), rtol=1e-5)  # for images in [-1, 1]
  np.testing.assert_allclose(found["psnr"], np.mean(-10 * np.log10(pairs), 0), rtol=1e-5)
