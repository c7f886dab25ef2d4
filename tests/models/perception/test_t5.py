"""The T5 encoder against its definition in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.models.perception.t5 import T5Block, T5Encoder, relative_buckets
from flextok_jax.weights.perception import t5 as t5_files
from tests.support.t5_reference import LENGTHS, bucket, kept, some_ids, t5_reference, tensors, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp("t5"), tensors())


@pytest.mark.parametrize("buckets,furthest", [(32, 128), (8, 10), (16, 40)])
def test_relative_buckets(buckets, furthest):
  got = relative_buckets(200, buckets, furthest)
  assert got.dtype == np.int32
  for query in (0, 60, 199):
    assert got[query].tolist() == [bucket(key - query, buckets, furthest) for key in range(200)]
  assert set(got.ravel()) == set(range(buckets)) - {buckets // 2}  # distance 0 is never ahead


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "relu"])
def test_t5_equals_its_definition(gated, tmp_path):
  found = tensors(gated)
  write(tmp_path, found, shards=3, feed_forward_proj="gated-gelu" if gated else "relu")
  sizes, params = t5_files.load_t5(tmp_path, "float32")
  assert sizes["gated"] == gated and sizes["layer_norm_epsilon"] == 1e-3
  ids = some_ids()
  got = T5Encoder(**sizes).apply({"params": params}, ids, LENGTHS)
  assert got.shape == (3, 14, 12) and got.dtype == jnp.float32
  want = np.concatenate([t5_reference(found, row[:n], gated) for row, n in zip(ids, LENGTHS)])
  np.testing.assert_allclose(kept(got), want, atol=3e-5)


def test_padding_has_no_effect(folder):
  sizes, params = t5_files.load_t5(folder, "float32")
  run = jax.jit(T5Encoder(**sizes).apply)
  ids = some_ids()
  other = np.where(np.arange(14) < LENGTHS[:, None], ids, 29 - ids)
  assert (other != ids).any()
  wider = np.pad(ids, ((0, 0), (0, 3)), constant_values=7)
  one = kept(run({"params": params}, ids, LENGTHS))
  np.testing.assert_array_equal(kept(run({"params": params}, other, LENGTHS)), one)
  np.testing.assert_allclose(kept(run({"params": params}, wider, LENGTHS)), one, atol=1e-5)


def test_bfloat16_keeps_the_stream_in_float32(folder):
  """Features are close, and so is what a block adds to features in the thousands, where bfloat16 has steps of 16."""
  sizes, params = t5_files.load_t5(folder, "bfloat16")
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
  run = lambda dtype: T5Encoder(**sizes, dtype=dtype).apply({"params": params}, some_ids(), LENGTHS)
  want, got = run(jnp.float32), run(jnp.bfloat16)
  assert got.dtype == jnp.bfloat16
  assert np.abs(kept(got) - kept(want)).mean() < 0.05 * kept(want).std()
  rng = np.random.default_rng(0)
  x = jnp.asarray(3000 * rng.normal(size=(3, 14, 12)), jnp.float32)
  bias = jnp.asarray(rng.normal(size=(1, 2, 14, 14)), jnp.float32)
  first = jax.tree.map(lambda x: x[0], params["blocks"])
  want, got = (
    T5Block(2, 4, 20, 1e-3, True, d).apply({"params": first}, x, bias, LENGTHS)[0] - x
    for d in (jnp.float32, jnp.bfloat16)
  )
  assert np.abs(kept(got) - kept(want)).mean() < 0.05 * kept(want).std()
