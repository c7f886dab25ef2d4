"""A tiny tokenizer with random weights and a VAE."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np

from flextok_jax import config as common
from flextok_jax.inference import tokenizer as api
from flextok_jax.weights import loading

GROUPS = 2


def random_model(**overrides):
  """Returns a tiny random model: 32 px, 8 x 8 latents, 4 x 4 patches, 6 registers."""
  config = common.derive(
    image_size=32,
    dtype="float32",
    vae=dict(latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, norm_groups=GROUPS),
    encoder=dict(width=64, depth=1),
    decoder=dict(width=64, depth=2),
    tokens=dict(num_registers=6, nested_dropout="uniform"),
    **overrides,
  )
  rng = np.random.default_rng(0)
  fill = lambda path, x: jnp.asarray(rng.normal(size=x.shape) * 0.2 + (path[-1].key == "scale"), jnp.float32)
  params = jax.tree_util.tree_map_with_path(fill, loading.abstract_params(config))
  return api.FlexTok(params, FrozenConfigDict(config))


def with_fields(model, **fields):
  config = ConfigDict(model.config).copy_and_resolve_references()  # ConfigDict alone shares nested fields
  config.update(fields)
  return FrozenConfigDict(config)
