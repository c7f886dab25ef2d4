"""The attention module: a part of the queries, its parameters, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.models import layers
from flextok_jax.models.attention import SelfAttention


def module_of(**options):
  sizes = dict(width=16, head_dim=8, mlp_hidden=16, logit_scale=1.0, gated_mlp=False, activation="silu")
  return SelfAttention(layers.BlockChoices(**sizes, qk_norm="unscaled", **options))


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


def test_parameters_are_those_of_a_dense_layer():
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
