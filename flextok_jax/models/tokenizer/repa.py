"""The projector of REPA (Yu et al. 2024, arXiv 2410.06940), from features of the decoder to those of a teacher."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers


class Projector(nn.Module):
  """Linear > SiLU > Linear > SiLU > Linear (appendix of the paper, `build_mlp` of its code)."""

  hidden: int
  features: int  # of the teacher
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x [b, n, d] -> [b, n, features]."""
    x = nn.silu(layers.dense(self.hidden, ("embed", "mlp"), "in", self.dtype)(x))
    x = nn.silu(layers.dense(self.hidden, ("mlp", "embed"), "middle", self.dtype)(x))
    return layers.dense(self.features, ("embed", None), "out", self.dtype)(x)
