"""The trainable stages behind one interface; training, evaluation and commands know nothing else of them."""

from flextok_jax.stages.ar import ARStage
from flextok_jax.stages.stage import Stage
from flextok_jax.stages.tokenizer import TokenizerStage
from flextok_jax.stages.vae import VAEStage

_STAGES = {"tokenizer": TokenizerStage, "vae": VAEStage, "ar": ARStage}


def make_stage(config) -> Stage:
  """Returns the stage that config.stage names.

  Raises:
    ValueError: for an unknown stage or sizes that do not fit together.
  """
  if config.stage not in _STAGES:
    raise ValueError(f"unknown stage {config.stage!r}: one of {', '.join(_STAGES)}")
  return _STAGES[config.stage](config)
