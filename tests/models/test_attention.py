"""The attention module: a part of the queries, its parameters, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.models import layers
from flextok_jax.models.attention import SelfAttention
from flextok_jax.ops.attention import MASKED


def module_of(**options):
  sizes = dict(width=16, head_dim=8, mlp_hidden=16, logit_scale=0.5, gated_mlp=False, activation="silu")
  return SelfAttention(layers.BlockChoices(**{**sizes, "qk_norm": "unscaled", **options}))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_queries_are_a_slice(bias):
  """Attention of some positions is that part of the attention of all, gradients too, with the same parameters."""
  module = module_of(qkv_bias=bias, out_bias=bias)
  x = jax.random.normal(jax.random.key(0), (2, 9, 16))
  mask = np.tri(9, dtype=bool)
  key_bias = jnp.log(jax.random.uniform(jax.random.key(1), (2, 9)))
  variables = nn.unbox(module.init(jax.random.key(2), x))
  some = nn.unbox(module.init(jax.random.key(2), x, queries=(2, 3)))
  jax.tree.map(np.testing.assert_array_equal, variables, some)
  variables = jax.tree.map(lambda p: p + 0.1, variables)  # so that biases are not zero

  @jax.jit
  def full(variables, x):
    y = module.apply(variables, x, mask, key_bias)[0][:, 2:5]
    return jnp.square(y).sum(), y

  @jax.jit
  def part(variables, x):
    y = module.apply(variables, x, mask, key_bias, (2, 3))[0]
    return jnp.square(y).sum(), y

  expected, expected_y = jax.grad(full, (0, 1), has_aux=True)(variables, x)
  got, y = jax.grad(part, (0, 1), has_aux=True)(variables, x)
  np.testing.assert_allclose(y, expected_y, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_parameters_match_a_dense_layer():
  """Names, shapes, logical axes and initial numbers of one fused projection."""
  x = jnp.zeros((1, 3, 16))

  class Fused(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes = ("embed", None, "heads", "head_dim")
      init = {"kernel_init": layers.xavier_uniform(16, axes), "bias_init": layers.zeros(*axes[1:])}
      return nn.DenseGeneral((3, 2, 8), **init, name="qkv")(x)

  expected = Fused().init(jax.random.key(3), x)["params"]["qkv"]
  got = module_of(qkv_bias=True).init(jax.random.key(3), x)["params"]
  assert set(got) == {"qkv", "out"}
  assert nn.get_partition_spec(got["qkv"]) == nn.get_partition_spec(expected)
  jax.tree.map(np.testing.assert_array_equal, nn.unbox(got["qkv"]), nn.unbox(expected))


def test_bad_queries_are_refused():
  module, x = module_of(), jnp.zeros((1, 4, 16))
  for queries in ((-1, 2), (0, 0), (2, 3)):
    with pytest.raises(ValueError, match="not among the 4 positions"):
      module.init(jax.random.key(0), x, queries=queries)


def test_the_module_passes_its_implementation_on():
  with pytest.raises(ValueError, match="attention 'cudnn' needs an NVIDIA GPU"):
    module_of(attention="cudnn").init(jax.random.key(0), jnp.zeros((1, 4, 16)))


def test_key_bias_counts_and_hides_keys():
  """A bias of log(n) is n equal keys, MASKED is none; together with a mask too."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 6, 32)).astype(np.float32)
  attention = module_of(width=32, head_dim=16)
  params = nn.unbox(attention.init(jax.random.key(0), x))
  mask = np.ones((6, 6), bool)
  mask[:, 0] = False
  bias = np.zeros((2, 6), np.float32)
  bias[0, 1], bias[1, 2] = np.log(3), MASKED
  y = np.asarray(attention.apply(params, x, mask, bias)[0])
  counted, hidden = x[:1, [1, 1, 1, 2, 3, 4, 5]], x[1:, [1, 3, 4, 5]]
  np.testing.assert_allclose(y[0, 1:], attention.apply(params, counted)[0][0, 2:], atol=1e-6)
  np.testing.assert_allclose(y[1, [1, 3, 4, 5]], attention.apply(params, hidden)[0][0], atol=1e-6)
  x[1, 2] = 100 * rng.normal(size=32)
  again = np.asarray(attention.apply(params, x, mask, bias)[0])
  np.testing.assert_array_equal(np.delete(again, 2, 1), np.delete(y, 2, 1))
