"""The scanned stack of blocks: rematerialisation; norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.models.layers import BlockChoices
from flextok_jax.models.transformer import Stream, Transformer
from flextok_jax.ops import norms


def test_remat_saves_memory_and_changes_no_gradient():
  """Of five blocks; each name needs clearly less temporary memory than the one before."""
  choices = BlockChoices(
    width=16,
    head_dim=8,
    mlp_hidden=42,
    logit_scale=1.0,
    gated_mlp=True,
    activation="silu",
    qk_norm="unscaled",
    attention="xla",
  )
  x = np.random.default_rng(0).normal(size=(4, 32, 16)).astype(np.float32)
  params = Transformer(5, choices, 0).init(jax.random.key(0), [Stream((x,))])
  memory, all_grads = [], []
  for remat in ("none", "dots", "full"):
    module = Transformer(5, choices, 0, remat)
    grad = jax.jit(
      jax.grad(lambda params, x, module=module: jnp.square(module.apply(params, [Stream((x,))])[0][0]).sum(), (0, 1))
    )
    program = grad.lower(params, x).compile()
    memory.append(program.memory_analysis().temp_size_in_bytes)
    all_grads.append(program(params, x))
  assert memory[1] < 0.8 * memory[0] and memory[2] < 0.8 * memory[1], memory
  for path, (grad, *others) in jax.tree.leaves_with_path(jax.tree.map(lambda *x: np.stack(x), *all_grads)):
    assert (grad != 0).any(), path
    for other in others:
      np.testing.assert_allclose(other, grad, rtol=1e-4, atol=1e-5 * np.abs(grad).max())


@pytest.mark.parametrize("dtype, gap", [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_derivatives_of_layer_norm_are_those_of_its_formula(dtype, gap):
  """Forward and backward."""
  x, tangent, cotangent = (jax.random.normal(jax.random.key(i), (4, 7, 64)).astype(dtype) for i in range(3))
  x = 3 * x + 1

  def formula(x):
    y = x.astype(jnp.float32)
    return ((y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5)).astype(x.dtype)

  for derive in (lambda f: jax.jvp(f, (x,), (tangent,))[1], lambda f: jax.vjp(f, x)[1](cotangent)[0]):
    found, wanted = (np.asarray(derive(f), np.float32) for f in (norms.layer_norm, formula))
    assert found.dtype == wanted.dtype and np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, rtol=gap, atol=gap)
