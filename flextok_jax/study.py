"""Studies of a tokenizer, and of a generator of its tokens: curves, tables and pictures, joined in one report.

python -m flextok_jax.study --checkpoint=TOKENIZER --out=DIR [--study=tokens,variation] [--metrics=psnr,ssim]

  tokens     quality of reconstructions against the number of tokens
  variation  how far decodes of the same tokens from different noises lie apart, against the number of tokens
  halting    quality against the lengths that thresholds of quality choose, and lengths against the number of objects

Writes STUDY.json, STUDY.png and STUDY_grid.png of each, and report.md and report.html of all studies that lie in DIR.
Killed and rerun, it goes on: what DIR/parts holds of the same models and settings is not computed again.
"""

import functools
from pathlib import Path

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

from flextok_jax import cli, detokenize, evaluate
from flextok_jax.checkpoints import loading
from flextok_jax.data import pipeline
from flextok_jax.evals import batches, halting, measures, progress, reconstruction, report, tokens, variation
from flextok_jax.ops import guidance
from flextok_jax.stages import make_stage
from flextok_jax.training import sharding

STUDIES = ("tokens", "variation", "halting")


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  texts = functools.partial(flags.DEFINE_list, flag_values=values)
  texts("study", ["all"], f"Of {', '.join(STUDIES)}; or 'all'.")
  string("checkpoint", None, "A tokenizer: file, folder or hub repository.")
  config_flags.DEFINE_config_file(
      "config", None, "Settings of data, eval and sampler; default: the checkpoint's own.", flag_values=values)
  string("out", None, "Folder for the results.")
  texts("metrics", ["psnr", "ssim", "mae", "perceptual"], "Measures of two images (evals/measures.py).")
  string("weights", None, "Folder with the weights of the networks among --metrics.")
  texts("sources", [], "Evaluation sets; default: config.eval.sources.")
  integer("num_images", None, "Images a set; default: config.eval.num_images.", 1)
  texts("num_tokens", [], "Token counts; default: config.eval.num_tokens.")
  integer("num_decodes", 4, "Of variation: decodes of the same tokens.", 2)
  string("quality_metric", None, "Of halting: the metric of the thresholds; default: the first of --metrics.")
  texts("qualities", [], "Of halting: thresholds; default: the mean of the metric at each token count.")
  integer("decoder_steps", None, "Euler steps of the decoder; default: the tokenizer's.", 1)
  flags.DEFINE_enum("decoder_guidance", None, guidance.MODES, "Default: the tokenizer's.", flag_values=values)
  flags.DEFINE_float("decoder_scale", None, "Of the decoder's guidance; default: the tokenizer's.", flag_values=values)
  integer("seed", None, "Of the noise; default: config.seed.")
  integer("batch_size", None, "Images at once; default: config.eval.batch_size.", 1)
  integer("grid_images", None, "Images a set in the grids; default: config.eval.grid_images.", 1)


class Models:
  """What the studies share: the tokenizer, its evaluation sets and functions over them."""

  def __init__(self, values: flags.FlagValues):
    self.measures = measures.make(values.metrics, values.weights)
    config, params = loading.load(values.checkpoint)
    if config.stage != "tokenizer":
      raise ValueError(f"--checkpoint={values.checkpoint} is a model of stage {config.stage!r}: give a tokenizer")
    if values.config is not None:
      config = evaluate.with_settings(config, values.config)
    if "eval" not in config:
      raise ValueError(f"{values.checkpoint} carries no settings of data and evaluation: give --config=configs/X.py")
    config = evaluate.apply_flags(config.copy_and_resolve_references(), values)
    for name in ("batch_size", "grid_images"):
      if values[name].value is not None:
        config.eval[name] = values[name].value
    self.config = detokenize.with_sampler(
        config, values.decoder_steps, values.decoder_guidance, values.decoder_scale)
    self.counts = reconstruction.token_counts(config.eval.num_tokens, config.tokens.num_registers)
    self.mesh = sharding.make_mesh()
    self.params = sharding.place(params, sharding.replicated(self.mesh))
    self.identity = progress.identity(params)
    c = self.config.eval
    self.extent = {"num_images": c.num_images, "grid_images": c.grid_images}
    self.compare = batches.make_compare(self.measures, c.batch_size, self.mesh)

  @functools.cached_property
  def predict_fns(self):
    return make_stage(self.config).predict_fns

  @functools.cached_property
  def sets(self) -> dict[str, dict]:
    """Evaluation sets by name, as of pipeline.eval_set."""
    c = self.config
    return {name: pipeline.eval_set(c.data, name, image_size=c.image_size, num_images=c.eval.num_images)
            for name in c.eval.sources}

  @functools.cached_property
  def _ids(self) -> dict[str, np.ndarray]:
    encode = batches.Batched(self.predict_fns["tokenize"], self.params, self.config.eval.batch_size, self.mesh)
    return {name: encode(found["image"]) for name, found in self.sets.items()}

  def encoded(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Name of a set -> (images uint8 [n, h, w, 3], ids int32 [n, num_registers])."""
    return self.sets[name]["image"], self._ids[name]

  @functools.cached_property
  def decode(self):
    c = self.config
    return batches.make_decode(self.predict_fns["detokenize"], self.params, c.tokens.num_registers, c.seed,
                               c.eval.batch_size, self.mesh)


def main(values: flags.FlagValues):
  """Runs values.study and writes what the module's docstring lists under values.out."""
  chosen = _check_flags(values)
  models, out = Models(values), Path(values.out)
  c = models.config
  settings = {
      "image_size": c.image_size, "weights": models.identity, "metrics": list(values.metrics), "seed": c.seed,
      "num_tokens": list(models.counts), "sampler": c.sampler.to_dict(),
      "sources": {name: c.data.sources[name].to_dict() for name in c.eval.sources},
  }
  parts = report.Parts(out, settings)
  for name in chosen:
    print(f"study {name}", flush=True)
    outcome = _STUDIES[name](values, models, parts)
    for path in outcome.write(out, name, {"checkpoint": values.checkpoint, "num_images": c.eval.num_images} | settings):
      print(path)
  for path in report.gather(out, STUDIES):
    print(path)


def _tokens(values, models: Models, parts: report.Parts) -> report.Outcome:
  c = models.config

  def run():
    kept = progress.Progress(Path(values.out) / report.PARTS / "tokens", parts.settings | models.extent)
    evaluator = reconstruction.Reconstruction(
        models.predict_fns, models.sets, models.counts, c.eval.batch_size, c.seed, c.eval.grid_images,
        sharding.batch_sharding(models.mesh), pair_measures=models.measures, progress=kept)
    found = evaluator.run(models.params)
    kept.clear()
    return found

  return tokens.study(parts, run, values.metrics, c.eval.sources, models.extent)


def _variation(values, models: Models, parts: report.Parts) -> report.Outcome:
  return variation.study(parts, models.decode, models.compare, models.encoded, models.config.eval.sources,
                         models.counts, values.num_decodes, models.extent)


def _halting(values, models: Models, parts: report.Parts) -> report.Outcome:
  c, metric = models.config, values.quality_metric or values.metrics[0]
  lengths = halting.make_lengths(
      c, models.params, metric, models.measures[metric], c.seed, c.eval.batch_size, models.mesh)
  return halting.study(
      parts, models.decode, models.compare, lengths, models.encoded, lambda name: models.sets[name]["num_objects"],
      c.eval.sources, models.counts, metric, [_number("qualities", item) for item in values.qualities], models.extent)


_STUDIES = {"tokens": _tokens, "variation": _variation, "halting": _halting}


def _number(name: str, item: str) -> float:
  try:
    return float(item)
  except ValueError:
    raise ValueError(f"--{name} takes numbers separated by commas, got {item!r}") from None


def _check_flags(values: flags.FlagValues) -> list[str]:
  """Checks what can be told without a checkpoint, and returns the studies."""
  for name in ("checkpoint", "out"):
    if not values[name].value:
      raise ValueError(f"--{name} is missing")
  if Path(values.out).exists() and not Path(values.out).is_dir():
    raise ValueError(f"--out={values.out} is a file: give a folder")
  if jax.process_count() > 1:
    raise ValueError("a study runs in one process, on all its devices: start it on one host")
  chosen = list(STUDIES) if values.study == ["all"] else values.study
  for name in chosen:
    if name not in STUDIES:
      raise ValueError(f"unknown study {name!r}: of {', '.join(STUDIES)}, or all")
  return [name for name in STUDIES if name in chosen]


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
