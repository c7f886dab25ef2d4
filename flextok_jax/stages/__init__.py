"""The trainable stages, behind the one interface that training, evaluation and commands use."""

from ml_collections import ConfigDict

from flextok_jax.config import check
from flextok_jax.stages.ar import ARStage
from flextok_jax.stages.stage import Stage
from flextok_jax.stages.tokenizer import TokenizerStage
from flextok_jax.stages.vae import VAEStage

_STAGES = {"tokenizer": TokenizerStage, "vae": VAEStage, "ar": ARStage}


def make_stage(config: ConfigDict) -> Stage:
  """Returns the stage named by config.stage.

  Raises:
    ValueError: a field is out of its range, or sizes do not fit together.
  """
  check(config)
  return _STAGES[config.stage](config)
