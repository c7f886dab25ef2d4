"""hash_tree depends on settings, paths, shapes and rounded values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from flextok_jax.core.hashing import hash_tree
from flextok_jax.parallel import sharding

ARRAYS = {"a": {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8)}, "b": np.ones(3, np.float32)}


def test_hash_value_is_stable():
  assert hash_tree({"width": 4}, ARRAYS) == "529db49329355d22"


def test_types_boxes_sharding_and_order_have_no_effect():
  expected = hash_tree({"x": 1, "y": 2}, ARRAYS)
  assert hash_tree({"y": 2, "x": 1}, dict(reversed(ARRAYS.items()))) == expected
  assert hash_tree({"x": 1, "y": 2}, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), ARRAYS)) == expected
  mesh = sharding.make_mesh()
  split = jax.device_put(ARRAYS["a"]["kernel"], jax.sharding.NamedSharding(mesh, P("data")))
  boxed = nn.LogicallyPartitioned(jnp.asarray(ARRAYS["b"]), ("width",))
  assert hash_tree({"x": 1, "y": 2}, {"a": {"kernel": split}, "b": boxed}) == expected


def test_settings_paths_shapes_and_values_change_the_hash():
  kernel, b = ARRAYS["a"]["kernel"], ARRAYS["b"]
  others = [
    ({"x": 2}, ARRAYS),
    ({"x": 1}, {"c": ARRAYS["a"], "b": b}),
    ({"x": 1}, {"a": {"kernel": kernel.reshape(4, 16)}, "b": b}),
    ({"x": 1}, {"a": {"kernel": kernel.T}, "b": b}),
    ({"x": 1}, {"a": ARRAYS["a"], "b": b * 1.01}),
    ({"x": 1}, {"a": ARRAYS["a"]}),
  ]
  assert len({hash_tree(*other) for other in [({"x": 1}, ARRAYS), *others]}) == len(others) + 1


def test_exact_hash_distinguishes_weights_that_round_alike():
  other = jax.tree.map(np.array, ARRAYS)
  assert hash_tree({}, ARRAYS, exact=True) == hash_tree({}, other, exact=True)
  other["b"][0] += 1e-6
  assert hash_tree({}, ARRAYS) == hash_tree({}, other)
  assert hash_tree({}, ARRAYS, exact=True) != hash_tree({}, other, exact=True)
