"""Metrics of samples, and the settings that are compared."""

import numpy as np
import pytest

from flextok_jax.evals.metrics import image, reference
from flextok_jax.evals.studies import sampling
from flextok_jax.parallel import sharding

RNG = np.random.default_rng(0)
MESH = sharding.make_mesh()


def pictures(*shape):
  return RNG.integers(0, 256, (*shape, 16, 16, 3)).astype(np.uint8)


def test_judges():
  images, conditions = pictures(5), [3, 3, "a star", "a star", "a star"]
  judge = sampling.make_diversity(image.make_compare(image.make_metrics(["mae"]), 4, MESH))
  gaps = [np.abs(images[i] / 255 - images[i + 1] / 255).mean() for i in (0, 2)]  # both conditions have the same number
  np.testing.assert_allclose(judge(images, conditions)["MAE between samples"], np.mean(gaps), rtol=1e-5)
  with pytest.raises(ValueError, match="num_samples=1: diversity needs at least two samples per condition"):
    judge(images, [3, 3, 1, 1, 2])

  look = lambda x: {layer: x.reshape(len(x), -1)[:, :2].astype(np.float64) for layer in ("pool", "spatial")}
  extract = lambda batches: map(look, batches)
  judge = sampling.make_comparison(reference.from_features([look(images)]), extract, ("gfid", "recall"), 2)
  same, other = judge(images, conditions), judge(pictures(5), conditions)
  assert list(same) == ["gfid", "recall"] and same["gfid"] < 1e-6 < other["gfid"] and same["recall"] == 1


def test_settings_change_one_at_a_time():
  rows = sampling.one_at_a_time({"top_k": 0, "num_steps": 4}, {"top_k": [0, 5], "num_steps": [1]}, "decoder ")
  assert rows == {
    "own settings": {"top_k": 0, "num_steps": 4},
    "decoder top k 5": {"top_k": 5, "num_steps": 4},
    "decoder steps 1": {"top_k": 0, "num_steps": 1},
  }
