"""Metrics of samples, with a few features per image instead of a network's."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np
import pytest

from flextok_jax.evals import generation
from flextok_jax.evals.metrics import frechet, reference
from flextok_jax.parallel import sharding

MATRIX = np.random.default_rng(3).normal(size=(16 * 16 * 3, 9)).astype(np.float32)
IMAGES = np.random.default_rng(4).integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)


def read_images(path):
  with np.load(path, allow_pickle=False) as arrays:
    return arrays["arr_0"]


def features(images):
  rows = images.reshape(len(images), -1)
  return {"pool": rows @ MATRIX[:, :6], "spatial": rows @ MATRIX[:, 4:9], "logits": rows @ MATRIX[:, 3:7]}


def measure(mesh, batch_size, folder=None):
  """Computes all Inception metrics of samples that are noise around their label."""
  draw = lambda rows: jnp.asarray(np.stack([rows % 7, np.where(rows % 3, 5, 9)], 1), jnp.int32)  # 9 ends a sequence
  keys = lambda rows: jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), rows)

  def decode(params, ids, keep_k, rows):
    noise = jax.vmap(lambda key: jax.random.normal(key, (16, 16, 3)))(keys(rows))
    return params * noise + (ids[:, 0] / 7)[:, None, None, None] + (keep_k == 2)[:, None, None, None]

  compared = reference.from_features(jax.tree.map(np.asarray, features(x / 255)) for x in (IMAGES[:5], IMAGES[5:]))
  evaluator = generation.Generation(
    draw,
    decode,
    num_ids=9,
    num_registers=4,
    image_size=16,
    settings=generation.Settings(generation.INCEPTION, (1, 2), 21, batch_size, seed=0, folder=folder),
    networks={"inception": Partial(features)},
    targets=lambda numbers: {},
    reference=compared,
    mesh=mesh,
  )
  return evaluator.run(jnp.float32(0.3))


def test_samples_are_written_by_one_run_at_a_time(tmp_path):
  path = tmp_path / "samples.npz"
  writer = generation.SampleWriter(path, IMAGES.shape)
  writer.write(0, IMAGES)
  with pytest.raises(ValueError, match="another run writes .*samples.part.npy: stop it"):
    generation.SampleWriter(path, IMAGES.shape)
  writer.finish()
  np.testing.assert_array_equal(read_images(path), IMAGES)
  assert list(tmp_path.iterdir()) == [path]


def test_metrics_are_independent_of_devices_and_batches(tmp_path):
  one = measure(sharding.make_mesh(devices=jax.devices()[:1]), 5, folder=tmp_path).scores["sets"]["samples"]
  many = measure(sharding.make_mesh(), 16).scores["sets"]["samples"]
  for column in ("1", "2"):
    assert list(one["by_tokens"][column]) == ["gfid", "sfid", "is", "is_std", "precision", "recall", "fid_infinity"]
    for name, value in one["by_tokens"][column].items():
      np.testing.assert_allclose(many["by_tokens"][column][name], value, rtol=1e-4, err_msg=name)
  images = np.concatenate([read_images(tmp_path / f"samples_{count}.npz") for count in (1, 2)])
  ended = np.flatnonzero(np.arange(21) % 3 == 0)  # these have no second token
  same = (images[:21] == images[21:]).all((1, 2, 3))
  np.testing.assert_array_equal(np.flatnonzero(same), ended)
  fake, real = (features(jnp.float32(x) / 255) for x in (images[21:], IMAGES))
  found = one["by_tokens"]["2"]
  gaussian = lambda x: (np.float64(x).mean(0), np.cov(np.float64(x), rowvar=False))
  for name, layer in (("gfid", "pool"), ("sfid", "spatial")):
    expected = frechet.frechet_distance(*gaussian(fake[layer]), *gaussian(real[layer]))
    np.testing.assert_allclose(found[name], expected, rtol=1e-4)
  infinite = frechet.fid_infinity(np.asarray(fake["pool"]), *gaussian(real["pool"]), smallest=10).value
  np.testing.assert_allclose(found["fid_infinity"], infinite, rtol=1e-4)
