"""The scanned stack of blocks: rematerialisation."""

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.models.layers import BlockChoices
from flextok_jax.models.transformer import Transformer


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
  params = Transformer(5, choices, 0).init(jax.random.key(0), (x,))
  memory, all_grads = [], []
  for remat in ("none", "dots", "full"):
    module = Transformer(5, choices, 0, remat)
    grad = jax.jit(jax.grad(lambda params, x, module=module: jnp.square(module.apply(params, (x,))[0]).sum(), (0, 1)))
    program = grad.lower(params, x).compile()
    memory.append(program.memory_analysis().temp_size_in_bytes)
    all_grads.append(program(params, x))
  assert memory[1] < 0.8 * memory[0] and memory[2] < 0.8 * memory[1], memory
  for path, (grad, *others) in jax.tree.leaves_with_path(jax.tree.map(lambda *x: np.stack(x), *all_grads)):
    assert (grad != 0).any(), path
    for other in others:
      np.testing.assert_allclose(other, grad, rtol=1e-4, atol=1e-5 * np.abs(grad).max())
