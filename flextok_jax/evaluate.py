"""Measures reconstructions of held-out images at every token count and draws them.

python -m flextok_jax.evaluate --workdir=DIR [--config=NAME] [--checkpoint=PATH] [--num_tokens=1,2,4]
    [--metrics=psnr,ssim,mae,lpips_alex,lpips_vgg,dreamsim,dinov2,rfid --weights=DIR]

Of a generator, its loss; with --tokenizer and --metrics its samples, see flextok_jax/evaluate_samples.py.

Prints a table; writes report.json, curve.png and grid_<set>.png, and appends the report to eval.jsonl. Killed and run
again with the same flags, it goes on where it was.
"""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from flextok_jax import cli, evaluate_samples
from flextok_jax.config import check_at_least_one
from flextok_jax.evals import generation, progress, reconstruction, token_loss
from flextok_jax.evals.make import make_evaluator
from flextok_jax.evals.metrics import measures
from flextok_jax.evals.metrics.image import METRICS as PLAIN
from flextok_jax.parallel import processes, sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import checkpoint, inputs
from flextok_jax.weights import loading
from flextok_jax.weights.perception import networks

MODEL_FIELDS = ("stage", "image_size", "vae", "encoder", "decoder", "tokens", "ar", "text")
RFID = "rfid"
# Without effect here.
TRAINING_FIELDS = (
  "vae.sample_posterior",
  "tokens.nested_dropout",
  "tokens.null_prob",
  "tokens.quantization_dropout",
  "tokens.corruption",
  "ar.tokenizer",
  "ar.drop_condition",
  "ar.position_decay",
  *checkpoint.FREE_AR,
)


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  cli.define_config_flag("Settings of data, eval and sampler; default: the checkpoint's own.", values)
  flags.DEFINE_string(
    "workdir", None, "The run's directory: its newest checkpoint, and DIR/eval for results.", flag_values=values
  )
  flags.DEFINE_string(
    "checkpoint", None, "Another checkpoint to evaluate: file, folder or hub repository.", flag_values=values
  )
  flags.DEFINE_list("num_tokens", [], "Token counts; default: config.eval.num_tokens.", flag_values=values)
  flags.DEFINE_list("sources", [], "Evaluation sets; default: config.eval.sources.", flag_values=values)
  flags.DEFINE_integer("num_images", None, "Images a set; default: config.eval.num_images.", flag_values=values)
  flags.DEFINE_integer("seed", None, "Of the decoder's noise; default: config.seed.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the results; default: WORKDIR/eval.", flag_values=values)
  flags.DEFINE_integer(
    "batch_size", None, "Images at once; default: config.eval.batch_size, or 64.", 1, flag_values=values
  )
  flags.DEFINE_list(
    "metrics",
    [],
    f"Of {', '.join((*measures.NAMES, RFID))}; default: psnr, ssim, mae. Of samples: {', '.join(generation.NAMES)}.",
    flag_values=values,
  )
  flags.DEFINE_string("weights", None, "Folder with the weights of the metrics' networks.", flag_values=values)
  flags.DEFINE_integer("keep_every", 50, "Batches between two writes of the results so far.", 1, flag_values=values)
  evaluate_samples.define_flags(values)


def main(values: flags.FlagValues):
  """Evaluates a checkpoint and writes its report."""
  if not values.checkpoint and not values.workdir:
    raise ValueError("nothing to evaluate: give --workdir or --checkpoint")
  if not values.out and not values.workdir:
    raise ValueError("nowhere to write: give --out or --workdir")
  out = Path(values.out or Path(values.workdir) / "eval")
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out={out} is a file: give a folder")
  of_samples = flags.FlagValues()
  evaluate_samples.define_flags(of_samples)
  for name in ("config", "sources") if values.tokenizer else of_samples:
    if values[name].present:
      raise ValueError(
        f"--{name} has no meaning {'with' if values.tokenizer else 'without'} --tokenizer, which asks"
        " for samples of a generator"
      )
  if values.tokenizer:
    report, conditions, kept = evaluate_samples.evaluate(values, out)
  else:
    report, conditions, kept = _evaluate(values, out)
  if not processes.is_process_0():
    return
  paths = report.write(out, conditions)
  with open(out / "eval.jsonl", "a") as f:
    f.write(json.dumps({**conditions, **report.scores}) + "\n")
  kept.clear()
  print(report.table() + "\n")
  for path in (*paths, out / "eval.jsonl"):
    print(path)


def _evaluate(values: flags.FlagValues, out: Path):
  """Returns the report of a checkpoint, its conditions, and what was kept on the way to it."""
  source = values.checkpoint or values.workdir
  config, params = loading.load(source, mesh=sharding.make_mesh())
  if values.config is not None:
    config = with_settings(config, values.config)
  if "eval" not in config:
    raise ValueError(f"{source} carries no settings of data and evaluation: give --config=NAME as well")
  config = apply_flags(config.copy_and_resolve_references(), values)
  settings = {"weights": progress.identity(params), "networks": values.weights, "config": config.to_dict()}
  kept = progress.Progress(out / "so_far", settings | {"metrics": values.metrics}, values.keep_every)
  report = evaluate(config, params, values.metrics, values.weights, kept)
  conditions = {"checkpoint": str(source), "image_size": config.image_size}
  if report.scores.get("num_tokens"):  # images were decoded
    conditions["sampler"] = config.sampler.to_dict()
  return report, conditions, kept


def with_settings(trained: ConfigDict, given: ConfigDict) -> ConfigDict:
  """Returns the config `given` with the model of the config `trained`, which must be the same where both tell it."""
  if "data" in trained:  # of a run; other checkpoints tell nothing but the model
    check_same_model(given, trained)
  config = given.copy_and_resolve_references()
  with config.unlocked():
    for name in MODEL_FIELDS:
      if name in trained:
        config[name] = trained[name]
  return config


def check_same_model(given: Mapping[str, Any], trained: Mapping[str, Any]):
  """Raises ValueError where two configs describe different models."""
  given, trained = (
    {k: v for name in MODEL_FIELDS if name in c for k, v in _flat(name, c[name])} for c in (given, trained)
  )
  for name in sorted(given.keys() & trained.keys()):  # an older checkpoint may lack a field
    if name not in TRAINING_FIELDS and given[name] != trained[name]:
      raise ValueError(
        f"--config has {name} = {given[name]!r}, but the checkpoint was trained with"
        f" {trained[name]!r}: give the config of that run, or none"
      )


def apply_flags(config, values: flags.FlagValues):
  """Returns the config with evaluation settings from the flags.

  Raises:
    ValueError: naming the flag.
  """
  for name in ("num_tokens", "sources"):
    if values[name].value and config.stage == "ar":
      raise ValueError(f"--{name} has no meaning for a generator: its loss is over all tokens of config.data.tokens")
  if values.num_tokens:
    if config.stage == "vae":
      raise ValueError("--num_tokens has no meaning for a model of stage 'vae', which has no tokens")
    config.eval.num_tokens = tuple(cli.numbers("num_tokens", values.num_tokens))
  if values.sources:
    config.eval.sources = tuple(values.sources)
  if values.num_images is not None:
    config.eval.num_images = values.num_images
  if values.seed is not None:
    config.seed = values.seed
  if values.batch_size is not None:
    config.eval.batch_size = values.batch_size
  return config


def evaluate(
  config, params, metrics: Sequence[str] = (), weights: str | None = None, kept: progress.Progress | None = None
) -> reconstruction.Report | token_loss.Report:
  """Evaluates params on the validation splits of config.eval.sources, a generator on those of config.data.tokens.

  Args:
    metrics: of measures.NAMES, and "rfid"; (): psnr, ssim, mae.
    weights: folder with the weights of networks, see weights/perception/networks.py.
    kept: what an earlier call left behind.

  Raises:
    ValueError: a setting out of range, before anything is read or compiled.
  """
  check_at_least_one(config, "eval.num_images", "eval.batch_size", "eval.grid_images")
  options = {}
  if config.stage != "ar":
    pairs = [name for name in metrics if name != RFID]
    options = {"measures": measures.make(pairs if metrics else PLAIN, weights), "progress": kept, "once": True}
    if RFID in metrics:
      options["features"] = networks.inception(weights, RFID)
  elif metrics:
    raise ValueError(f"--metrics={','.join(metrics)} of a generator are of its samples: give --tokenizer as well")
  stage = make_stage(config)
  mesh = sharding.make_mesh()  # all devices here, whatever the training had
  evaluator = make_evaluator(config, stage, mesh, inputs.make_prepare(config, mesh), **options)
  return evaluator.run(sharding.place(params, sharding.replicated(mesh)))


def _flat(name: str, value: Any):
  """Yields (dotted name, value) of the leaves of a nested config; sequences compare as tuples."""
  if isinstance(value, Mapping) or hasattr(value, "items"):
    for key, inner in value.items():
      yield from _flat(f"{name}.{key}", inner)
  else:
    yield name, tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
