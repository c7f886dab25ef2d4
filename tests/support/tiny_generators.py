"""Tiny random generators of token ids, and the tokenizer of these ids."""

from ml_collections import ConfigDict
import numpy as np

from flextok_jax.config import derive
from flextok_jax.stages import make_stage
from flextok_jax.stages.ar import ARStage
from flextok_jax.weights import fingerprints, saving
from tests.support.tiny import make_params, tiny_config

NUM_CODES = 8 * 5 * 5


def generator_config(**ar) -> ConfigDict:
  """A generator of up to 4 tokens of tiny_config's tokenizer, with 5 classes."""
  settings = dict(width=16, depth=1, head_dim=8, num_ids=NUM_CODES, num_tokens=4, num_classes=5)
  return derive(
    stage="ar",
    dtype="float32",
    ar={**settings, **ar},
    text=dict(encoder="bytes", features=16, head_dim=8, mlp_hidden=16, depth=1, max_length=24),
  )


def save(folder) -> dict:
  """Saves a tokenizer of 16 px images, 4 registers and 200 codes, and generators for it; returns the paths by name."""
  config = tiny_config()
  params = make_params(make_stage(config))
  saving.save_weights(folder / "tokenizer", config, params)
  generators = {
    "class": dict(condition="class", tokenizer=fingerprints.tokenizer(config, params)),
    "text": dict(condition="text", stop=True, bias=True),
    "none": dict(condition="none"),
    "foreign": dict(condition="none", tokenizer="0123456789abcdef"),
    "other_codes": dict(condition="none", num_ids=240),
    "longer": dict(condition="none", num_tokens=8),
  }
  for name, ar in generators.items():
    config = generator_config(**ar)
    params = make_params(ARStage(config))
    if config.ar.stop:  # as likely as all other ids together
      params["ar"]["readout"]["bias"][-1] = np.log(NUM_CODES)
    saving.save_weights(folder / name, config, params)
  return {path.name: path for path in folder.iterdir()}
