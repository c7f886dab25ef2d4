"""The evaluation that a config asks for, and what it leaves to be measured."""

from collections.abc import Callable
from typing import Any

from flextok_jax.data import pipeline
from flextok_jax.data.shards import tokens
from flextok_jax.evals.latents import ScalingFactor
from flextok_jax.evals.reconstruction import Reconstruction
from flextok_jax.evals.token_loss import TokenLoss
from flextok_jax.inference.decoding import token_counts
from flextok_jax.parallel import sharding
from flextok_jax.training import inputs


def make_measure(config, stage, mesh, evaluator: Reconstruction | TokenLoss) -> Callable[[Any], dict[str, float]]:
  """Returns a function of parameters that measures what the config leaves to the data: {field, dotted: value}.

  That is vae.scaling_factor, where stage "vae" has it 0, on the evaluator's images; else it is always {}.
  """
  if config.stage != "vae" or config.vae.scaling_factor:
    return lambda params: {}
  placed = sharding.batch_sharding(mesh)
  measure = ScalingFactor(stage.predict_fns["moments"], evaluator.images, config.eval.batch_size, placed)
  return lambda params: {"vae.scaling_factor": measure(params)}


def make_evaluator(
  config, stage, mesh, prepare: Callable[[dict], dict], once: bool = False, **options: Any
) -> Reconstruction | TokenLoss:
  """Returns the evaluation of config.eval: evaluator.run(params) gives a report.

  A report has scalars(), table() and write(folder, settings).

  Args:
    prepare: of training/inputs.py, for the stage "ar".
    once: images are read as they are needed and not kept for another run.
    **options: of Reconstruction: measures, features, progress.

  Raises:
    ValueError: a setting out of range, or nothing to evaluate on.
  """
  c = config.eval
  placed = sharding.batch_sharding(mesh)
  if config.stage == "ar":
    arrays = tokens.eval_arrays(*inputs.open_tokens(config, "validation"), c.num_images)
    return TokenLoss(stage.predict_fns["token_losses"], arrays, c.batch_size, placed, prepare)
  counts = () if config.stage == "vae" else token_counts(c.num_tokens, config.tokens.num_registers)
  data, size = inputs.image_data(config), dict(image_size=config.image_size, num_images=c.num_images)
  images = (
    (lambda name: pipeline.EvalImages(data, name, **size))
    if once
    else (lambda name: pipeline.eval_set(data, name, **size)["image"])
  )
  sets = {name: images(name) for name in c.sources}
  return Reconstruction(stage.predict_fns, sets, counts, c.batch_size, config.seed, c.grid_images, placed, **options)
