"""Studies of a tokenizer, and of a generator of its tokens: curves, tables and pictures, joined in one report.

python -m flextok_jax.study --checkpoint=TOKENIZER --out=DIR [--study=tokens,variation,halting] [--metrics=psnr,ssim]
python -m flextok_jax.study --checkpoint=TOKENIZER --generator=GENERATOR --out=DIR [--study=sampling]
    [--classes=0,3,7 | --prompts_file=FILE] [--temperatures=0.5,1] [--top_ps=0,0.9] [--decoder_scales=1,4]

  tokens     quality of reconstructions against the number of tokens
  variation  how far decodes of the same tokens from different noises lie apart, against the number of tokens
  halting    quality against the lengths that thresholds of quality choose, and lengths against the number of objects
  sampling   samples by the generator's choices of tokens against the decoder's guidance and steps

Writes STUDY.json, STUDY.png and STUDY_grid.png of each, and report.md and report.html of all studies that lie in DIR.
Killed and rerun, it goes on: what DIR/parts holds of the same models and settings is not computed again.
"""

from collections.abc import Callable
import functools
from pathlib import Path

from absl import flags
import jax
import numpy as np

from flextok_jax import cli, evaluate, evaluate_samples
from flextok_jax.data import pipeline
from flextok_jax.evals import batches, progress, report
from flextok_jax.evals import generation as generation_metrics
from flextok_jax.evals.metrics import measures, reference
from flextok_jax.evals.studies import halting
from flextok_jax.evals.studies import sampling as sampling_study
from flextok_jax.evals.studies import tokens as tokens_study
from flextok_jax.evals.studies import variation as variation_study
from flextok_jax.inference import decoding
from flextok_jax.inference import generator as generation
from flextok_jax.inference import prompts as prompts_lib
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.ops import guidance
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs
from flextok_jax.weights import loading
from flextok_jax.weights.perception import networks

JUDGES = ("gfid", "sfid", "precision", "recall")
_SWEPT = {
  "temperatures": ("temperature", float),
  "top_ks": ("top_k", int),
  "top_ps": ("top_p", float),
  "guidance_scales": ("guidance_scale", float),
}  # flags, and arguments of generate
_DECODERS = {"decoder_scales": ("guidance_scale", float), "decoder_step_counts": ("num_steps", int)}
_ONLY = {  # flags that one study alone takes
  "variation": ("num_decodes",),
  "halting": ("quality_metric", "qualities"),
  "sampling": (
    "generator",
    "setting",
    "classes",
    "prompts_file",
    "num_samples",
    "judges",
    "reference",
    "reference_images",
    *_SWEPT,
    *_DECODERS,
  ),
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  texts = functools.partial(flags.DEFINE_list, flag_values=values)
  texts("study", ["all"], f"Of {', '.join(STUDIES)}; or 'all', without sampling where there is no --generator.")
  string("checkpoint", None, "A tokenizer: file, folder or hub repository.")
  cli.define_config_flag("Settings of data, eval and sampler; default: the checkpoint's own.", values)
  string("out", None, "Folder for the results.")
  texts("metrics", ["psnr", "ssim", "mae", "perceptual"], f"Of {', '.join(measures.NAMES)}; of tokens rfid too.")
  string("weights", None, "Folder with the weights of the metrics' networks.")
  texts("sources", [], "Evaluation sets; default: config.eval.sources.")
  integer("num_images", None, "Images a set; default: config.eval.num_images.", 1)
  texts("num_tokens", [], "Token counts; default: config.eval.num_tokens.")
  integer("decoder_steps", None, "Euler steps of the decoder; default: the tokenizer's.", 1)
  flags.DEFINE_enum("decoder_guidance", None, guidance.MODES, "Default: the tokenizer's.", flag_values=values)
  flags.DEFINE_float("decoder_scale", None, "Of the decoder's guidance; default: the tokenizer's.", flag_values=values)
  integer("seed", None, "Of noises and samples; default: config.seed.")
  integer("batch_size", None, "Images at once; default: config.eval.batch_size.", 1)
  integer("grid_images", None, "Images a set in the grids; default: config.eval.grid_images.", 1)
  integer("num_decodes", 4, "Of variation: decodes of the same tokens.", 2)
  string("quality_metric", None, "Of halting: the metric of the thresholds; default: the first of --metrics.")
  texts("qualities", [], "Of halting: thresholds; default: what each number of tokens gives on average.")
  string("generator", None, "Of sampling, as what follows: a generator, file, folder or hub repository.")
  flags.DEFINE_multi_string(
    "setting", [], "name=value, of flextok_jax.load_ar, for the released format.", flag_values=values
  )
  texts("classes", [], "Classes by number; default: all.")
  string("prompts_file", None, "File with a text a line.")
  integer("num_samples", 4, "Samples a class or prompt.", 1)
  texts("temperatures", [0.5, 1.5], "Each in place of the generator's own, as top_ks, top_ps and guidance_scales.")
  texts("top_ks", [10, 100], "0: off.")
  texts("top_ps", [0, 0.5], "0: off.")
  texts("guidance_scales", [1, 4], "1: off.")
  texts("decoder_scales", [1, 4], "Each in place of the decoder's own guidance scale.")
  texts("decoder_step_counts", [1, 5], "Each in place of the decoder's own number of steps.")
  texts("judges", [], f"Of {', '.join(JUDGES)}, beside the diversity by --metrics; by --weights and --reference.")
  string("reference", None, "Statistics or images of a reference set, .npz; or a data source of the tokenizer.")
  integer("reference_images", None, "Of a data source at most; default: all.", 1)


class Models:
  """What the studies share: the tokenizer, its evaluation sets and functions over them."""

  def __init__(self, values: flags.FlagValues):
    self.measures = measures.make([name for name in values.metrics if name != evaluate.RFID], values.weights)
    config, params = loading.load(values.checkpoint)
    if config.stage != "tokenizer":
      raise ValueError(f"--checkpoint={values.checkpoint} is a model of stage {config.stage!r}: give a tokenizer")
    if values.config is not None:
      config = evaluate.with_settings(config, values.config)
    if "eval" not in config:
      raise ValueError(f"{values.checkpoint} carries no settings of data and evaluation: give --config=NAME")
    config = evaluate.apply_flags(config.copy_and_resolve_references(), values)
    if values.grid_images is not None:
      config.eval.grid_images = values.grid_images
    with cli.renamed(**cli.DECODER_FLAGS):
      config.sampler.update(decoding.override_sampler(config.sampler, **cli.decoder_flags(values)))
    self.config = config
    self.counts = decoding.token_counts(config.eval.num_tokens, config.tokens.num_registers)
    self.extent = {"num_images": config.eval.num_images, "grid_images": config.eval.grid_images}
    self.mesh = sharding.make_mesh()
    self.params = sharding.place(params, sharding.replicated(self.mesh))
    self.identity = progress.identity(params)
    self.compare = batches.make_compare(self.measures, config.eval.batch_size, self.mesh)

  @functools.cached_property
  def sets(self) -> dict[str, dict]:
    """Evaluation sets by name, as of pipeline.eval_set."""
    c = self.config
    return {
      name: pipeline.eval_set(inputs.image_data(c), name, image_size=c.image_size, num_images=c.eval.num_images)
      for name in c.eval.sources
    }

  @functools.cached_property
  def _ids(self) -> dict[str, np.ndarray]:
    tokenize = make_stage(self.config).predict_fns["tokenize"]
    encode = batches.Batched(tokenize, self.params, self.config.eval.batch_size, self.mesh)
    return {name: encode(found["image"]) for name, found in self.sets.items()}

  def encoded(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Name of a set -> (images uint8 [n, h, w, 3], ids int32 [n, num_registers])."""
    return self.sets[name]["image"], self._ids[name]

  def decoder(self, sampler: dict) -> Callable:
    """Returns batches.make_decode of the tokenizer with other settings of its sampler."""
    c = self.config.copy_and_resolve_references()
    c.sampler.update(sampler)
    return batches.make_decode(
      make_stage(c).predict_fns["detokenize"], self.params, c.tokens.num_registers, c.seed, c.eval.batch_size, self.mesh
    )

  @functools.cached_property
  def decode(self) -> Callable:
    return self.decoder({})


def main(values: flags.FlagValues):
  """Runs values.study and writes what the module's docstring lists under values.out."""
  chosen = _check_flags(values)
  models, out = Models(values), Path(values.out)
  c = models.config
  settings = {
    "image_size": c.image_size,
    "weights": models.identity,
    "metrics": list(values.metrics),
    "networks": values.weights,
    "seed": c.seed,
    "sampler": c.sampler.to_dict(),
  }
  parts = report.Parts(out, settings)
  given = {"checkpoint": values.checkpoint} | {name: values[name].value for name in values if values[name].present}
  given.pop("config", None)
  for name in chosen:
    print(f"study {name}", flush=True)
    for path in STUDIES[name](values, models, parts).write(out, name, given | settings):
      print(path)
  for path in report.gather(out, list(STUDIES)):
    print(path)


def tokens(values: flags.FlagValues, models: Models, parts: report.Parts) -> report.Outcome:
  """Quality against the number of tokens."""
  c = models.config
  asked = _sources(models, c.eval.sources) | models.extent | {"num_tokens": list(models.counts)}

  def run():
    kept = progress.Progress(Path(values.out) / report.PARTS / "tokens", parts.settings | asked)
    found = evaluate.evaluate(c, models.params, values.metrics, values.weights, kept)
    kept.clear()
    return found

  return tokens_study.study(parts, run, values.metrics, asked)


def variation(values: flags.FlagValues, models: Models, parts: report.Parts) -> report.Outcome:
  """Variation between decodes of the same tokens."""
  asked = {name: _sources(models, [name]) | models.extent for name in models.config.eval.sources}
  return variation_study.study(
    parts, models.decode, models.compare, models.encoded, asked, models.counts, values.num_decodes
  )


def halt(values: flags.FlagValues, models: Models, parts: report.Parts) -> report.Outcome:
  """Lengths chosen by quality."""
  c, metric = models.config, values.quality_metric or next(iter(models.measures))
  asked = {name: _sources(models, [name]) | models.extent for name in c.eval.sources}
  lengths = halting.make_lengths(
    c, models.params, metric, models.measures[metric], c.seed, c.eval.batch_size, models.mesh
  )
  return halting.study(
    parts,
    models.decode,
    models.compare,
    lengths,
    models.encoded,
    lambda name: models.sets[name]["num_objects"],
    asked,
    models.counts,
    metric,
    cli.numbers("qualities", values.qualities, float),
  )


def sampling(values: flags.FlagValues, models: Models, parts: report.Parts) -> report.Outcome:
  """Samples of a generator."""
  c = models.config
  gen = generation.load_ar(values.generator, mesh=models.mesh, **cli.parse_settings(values.setting))
  prompts_lib.check_tokenizer(FlexTok(models.params, c), gen, f"--checkpoint={values.checkpoint}")
  prompts = prompts_lib.read_prompts(values.prompts_file) if values.prompts_file else []
  classes = values.classes or (["all"] if gen.num_classes else [])
  conditions = prompts_lib.read_conditions(classes, prompts, gen, values.generator)
  swept, decoders = dict(_SWEPT), dict(_DECODERS)
  if conditions == [None]:
    _leave_out(values, swept, "guidance_scales", "a generator without --classes or --prompts_file")
  if c.sampler.guidance == "none":
    _leave_out(values, decoders, "decoder_scales", "a decoder without guidance (see --decoder_guidance)")
  own = {name: gen.config.ar[name] for name, _ in swept.values()}
  choices = sampling_study.one_at_a_time(
    own, {name: cli.numbers(flag, values[flag].value, kind) for flag, (name, kind) in swept.items()}
  )
  own = {name: c.sampler[name] for name, _ in decoders.values()}
  settings = sampling_study.one_at_a_time(
    own, {name: cli.numbers(flag, values[flag].value, kind) for flag, (name, kind) in decoders.items()}, "decoder "
  )
  for sampler in settings.values():
    decoding.override_sampler(c.sampler, sampler["num_steps"], None, sampler.get("guidance_scale"))
  each = [condition for condition in conditions for _ in range(values.num_samples)]

  def draw(choice):
    sequences, log_probs = prompts_lib.draw(
      gen,
      each,
      None,
      c.seed,
      c.eval.batch_size,
      progress=functools.partial(cli.print_progress, "samples drawn", batch_size=c.eval.batch_size),
      num_tokens=gen.num_tokens,
      **choice,
    )
    ids = np.zeros((len(each), gen.num_tokens), np.int32)
    for row, sequence in zip(ids, sequences):
      row[: len(sequence)] = sequence
    return ids, np.array([len(sequence) for sequence in sequences]), log_probs

  asked = {
    "generator": progress.identity(gen.params),
    "conditions": each,
    "judges": list(values.judges),
    "reference": values.reference,
    "reference_images": values.reference_images,
  }
  judges = [sampling_study.diversity(models.compare)] if values.num_samples > 1 else []
  judges += [_judge(values, models)] if values.judges else []
  return sampling_study.study(parts, draw, models.decoder, judges, each, choices, settings, asked)


STUDIES = {"tokens": tokens, "variation": variation, "halting": halt, "sampling": sampling}


def _sources(models: Models, names) -> dict:
  """What decides which images sets hold."""
  return {"sources": {name: models.config.data.sources[name].to_dict() for name in names}}


def _judge(values: flags.FlagValues, models: Models) -> sampling_study.Judge:
  size = -(-models.config.eval.batch_size // models.mesh.size) * models.mesh.size
  look = reference.make_look(networks.inception(values.weights, values.judges[0]), size, models.mesh)
  images = bool(set(generation_metrics.NEED_IMAGES) & set(values.judges))
  compared = evaluate_samples.load_reference(
    values.reference, values.reference_images, models.config, look, size, images
  )
  return sampling_study.against(compared, look, values.judges, size)


def _leave_out(values: flags.FlagValues, swept: dict, flag: str, where: str):
  """Leaves out a flag that has no effect, unless it is given."""
  if values[flag].present:
    raise ValueError(f"--{flag} has no effect with {where}: leave it out")
  del swept[flag]


def _check_flags(values: flags.FlagValues) -> list[str]:
  """Checks what can be told without a checkpoint, and returns the studies."""
  for name in ("checkpoint", "out"):
    if not values[name].value:
      raise ValueError(f"--{name} is missing")
  if Path(values.out).exists() and not Path(values.out).is_dir():
    raise ValueError(f"--out={values.out} is a file: give a folder")
  if jax.process_count() > 1:
    raise ValueError("a study runs in one process, on all its devices: start it on one host")
  for name in values.study:
    if name not in (*STUDIES, "all"):
      raise ValueError(f"unknown study {name!r}: of {', '.join(STUDIES)}, or all")
  chosen = [name for name in STUDIES if name in values.study or "all" in values.study]
  if "sampling" in chosen and not values.generator:
    if "sampling" in values.study:
      raise ValueError("--study=sampling needs --generator, whose samples it studies")
    print("no --generator: without the study of sampling", flush=True)
    chosen.remove("sampling")
  for study, names in _ONLY.items():
    for name in names:
      if study not in chosen and values[name].present:
        raise ValueError(
          f"--{name} is of the study of {study}: name it in --study"
          + (", and give --generator" if study == "sampling" and not values.generator else "")
        )
  if not set(values.metrics) - ({evaluate.RFID} if chosen != ["tokens"] else set()):
    raise ValueError(
      f"--metrics={','.join(values.metrics)} compare no two images: name one of {', '.join(measures.NAMES)}"
    )
  if values.quality_metric and values.quality_metric not in values.metrics:
    raise ValueError(f"--quality_metric={values.quality_metric} is not among --metrics: name it there as well")
  for name in values.judges:
    if name not in JUDGES:
      raise ValueError(f"--judges={name} is unknown: of {', '.join(JUDGES)}")
  if values.judges and not values.reference:
    raise ValueError(f"--judges={values.judges[0]} needs --reference: a .npz of statistics or images, or a data source")
  if values.prompts_file and values.classes:
    raise ValueError("--classes and --prompts_file are both given: give one of them")
  if values.num_samples == 1 and "sampling" in chosen and not values.judges:
    raise ValueError("--num_samples=1 leaves nothing to compare: raise it, or give --judges")
  return chosen


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
