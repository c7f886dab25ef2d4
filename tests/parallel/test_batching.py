"""Padded batches on all devices of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.parallel import batching, sharding


@pytest.mark.parametrize(
  "count, batch_size, sizes",
  [(1, 1, [8]), (3, 64, [8]), (5, 2, [8]), (16, 8, [8, 8]), (8, 8, [8]), (21, 9, [16, 16]), (21, 1, [8] * 3)],
)
def test_batched_equals_the_function_of_all_rows(count, batch_size, sizes):
  seen = []

  def function(params, x, scale):
    jax.debug.callback(lambda x: seen.append(len(x)), x)
    return {"sum": x.sum(1) * scale + params["offset"], "row": x}

  x, scale = np.arange(count * 4, dtype=np.float32).reshape(count, 4), np.arange(count, dtype=np.int32)
  result = batching.Batched(function, {"offset": np.float32(3)}, batch_size, sharding.make_mesh())(x, scale)
  jax.effects_barrier()
  np.testing.assert_array_equal(result["sum"], x.sum(1) * scale + 3)
  np.testing.assert_array_equal(result["row"], x)
  assert seen == sizes


def test_batches_come_without_padding():
  x = np.arange(19)
  parts = list(batching.Batched(lambda params, x: x + params, 1, 8).batches(x))
  np.testing.assert_array_equal(np.concatenate(parts), x + 1)
  assert [len(part) for part in parts] == [8, 8, 3]


def test_map_batches_dispatches_one_batch_ahead_and_pads_with_the_last_row():
  order = []

  def function(batch):
    order.append(batch["x"].tolist())
    return batch["x"]

  batches = ({"x": x} for x in batching.slices(np.arange(7), 3, start=1))
  results = []
  for result in batching.map_batches(function, batches, 4):
    order.append("fetched")
    results.append(result.tolist())
  assert results == [[1, 2, 3], [4, 5, 6]]
  assert order == [[1, 2, 3, 3], [4, 5, 6, 6], "fetched", "fetched"]


def test_batch_rows_divide_over_the_parts_of_a_batch():
  mesh = sharding.make_mesh()
  assert batching.batch_rows(32, 100, mesh) == 32
  assert batching.batch_rows(32, 5, mesh) == 8
  assert batching.batch_rows(33, 100, mesh) == 40
  assert batching.batch_rows(33, 100) == 33


def test_replicate_leaves_arrays_on_the_mesh_as_they_are():
  mesh = sharding.make_mesh()
  split = jax.device_put(jnp.arange(8), sharding.batch_sharding(mesh))
  there, new = batching.replicate((split, np.arange(8)), mesh)
  assert there is split
  assert new.sharding.is_fully_replicated and new.sharding.device_set == set(jax.devices())
