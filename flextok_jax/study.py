"""Studies of a tokenizer and of a generator of its tokens: curves, tables and pictures, joined in one report.

python -m flextok_jax.study --checkpoint=TOKENIZER --out=DIR [--study=tokens,variation,halting] [--metrics=psnr,ssim]
python -m flextok_jax.study --checkpoint=TOKENIZER --out=DIR --study=steps [--step_counts=1,2,4]
python -m flextok_jax.study --checkpoint=STUDENT --teacher=TOKENIZER --out=DIR --study=steps [--step_counts=1,2,4]
python -m flextok_jax.study --checkpoint=TOKENIZER --grid=GRID --out=DIR --study=order
    [--generator=GENERATOR --grid_generator=GENERATOR]
python -m flextok_jax.study --checkpoint=TOKENIZER --out=DIR --study=probe [--train_images=2000] [--weights=DIR]
python -m flextok_jax.study --checkpoint=TOKENIZER --generator=GENERATOR --out=DIR [--study=sampling]
    [--classes=0,3,7 | --prompts_file=FILE] [--temperatures=0.5,1] [--top_ps=0,0.9] [--decoder_scales=1,4]

  tokens     quality of reconstructions against the number of tokens
  variation  differences between decodes of the same tokens from different noises, against the number of tokens
  halting    quality at the lengths that quality thresholds choose, and lengths against the number of objects
  steps      decoders with fewer steps, and a student beside its teacher: fidelity, variation, seconds
  order      ordered tokens beside those of a 2D grid: reconstructions from the first tokens, loss by position, samples
  probe      classes of images by linear probes of the encoder's features, from the first tokens
  sampling   samples by the generator's choices of tokens against the decoder's guidance and steps

Writes STUDY.json, STUDY.png and, except for probe, STUDY_grid.png for each study, and report.md and report.html of all
studies in DIR.
An interrupted study resumes when it is run again: results in DIR/parts of the same models and settings are reused.
"""

from collections.abc import Callable
import functools
from typing import Any

from absl import flags
import jax
import numpy as np

from flextok_jax import cli
from flextok_jax.config import TOKENIZER_STAGES, with_fields
from flextok_jax.core.hashing import hash_tree
from flextok_jax.evals import from_config, generation
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.metrics import reference
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.reconstruction import RFID
from flextok_jax.evals.report import Report, write_document
from flextok_jax.evals.studies import halting, order, probe, sampling, steps, tokens, variation
from flextok_jax.evals.studies.subject import Subject
from flextok_jax.inference import adaptive, decoding, prompts
from flextok_jax.inference.generator import load_ar
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.ops import guidance
from flextok_jax.parallel import sharding
from flextok_jax.training import inputs
from flextok_jax.weights import fingerprints, loading
from flextok_jax.weights.perception import networks

JUDGES = ("gfid", "sfid", "precision", "recall")
PARTS = "parts"  # folder of partial results
_ALL = np.iinfo(np.int32).max  # images
_SWEPT = {
  "temperatures": ("temperature", float),
  "top_ks": ("top_k", int),
  "top_ps": ("top_p", float),
  "guidance_scales": ("guidance_scale", float),
}  # flags, and arguments of generate
_SAMPLERS = {"decoder_scales": ("guidance_scale", float), "decoder_step_counts": ("num_steps", int)}
_ONLY = {  # flags of some studies
  ("variation", "steps"): ("num_decodes",),
  ("steps",): ("teacher", "step_counts"),
  ("order",): ("grid", "grid_generator"),
  ("order", "sampling"): ("generator", "setting"),
  ("halting",): ("quality_metric", "qualities"),
  ("probe",): ("train_images",),
  ("sampling",): (
    "classes",
    "prompts_file",
    "num_samples",
    "judges",
    "reference",
    "reference_images",
    *_SWEPT,
    *_SAMPLERS,
  ),
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  texts = functools.partial(flags.DEFINE_list, flag_values=values)
  texts(
    "study",
    ["all"],
    f"From {', '.join(STUDIES)}; or 'all', without probe, sampling if there is no --generator, steps if there is no "
    "--teacher, and order if there is no --grid.",
  )
  string("checkpoint", None, "A tokenizer: file, folder or hub repository.")
  cli.define_config_flag("Settings of data, eval and sampler; default: the checkpoint's own.", values)
  string("out", None, "Folder for the results.")
  texts("metrics", ["psnr", "ssim", "mae", "perceptual"], f"From {', '.join(metrics_lib.NAMES)}; tokens: also rfid.")
  string("weights", None, "Folder with the weights of the metrics' networks.")
  texts("sources", [], "Evaluation sets; default: config.eval.sources.")
  integer("num_images", None, "Images per set; default: config.eval.num_images.", 1)
  texts("num_tokens", [], "Token counts; default: config.eval.num_tokens.")
  integer("decoder_steps", None, "Euler steps of the decoder; default: the tokenizer's.", 1)
  flags.DEFINE_enum("decoder_guidance", None, guidance.MODES, "Default: the tokenizer's.", flag_values=values)
  flags.DEFINE_float(
    "decoder_scale", None, "Guidance scale of the decoder; default: the tokenizer's.", flag_values=values
  )
  integer("seed", None, "Of noises and samples; default: config.seed.", 0, 2**32 - 1)
  integer("batch_size", None, "Images per batch; default: config.eval.batch_size.", 1)
  integer("grid_images", None, "Images per set in the grids; default: config.eval.grid_images.", 1)
  integer("num_decodes", 4, "Studies variation and steps: decodes of the same tokens.", 2)
  string("teacher", None, "Study steps: the tokenizer that a student was distilled from.")
  texts("step_counts", [1, 2, 4, 8], "Study steps: numbers of steps, besides the tokenizer's own.")
  string("quality_metric", None, "Study halting: the metric of the thresholds; default: the first of --metrics.")
  texts("qualities", [], "Study halting: thresholds; default: the mean at each number of tokens.")
  string("grid", None, "Study order: a tokenizer whose tokens are on a grid.")
  string("grid_generator", None, "Study order: a generator of its tokens; --generator: one of the other tokens.")
  integer("train_images", 2000, "Study probe: training images per set; --num_images are for validation.", 2)
  string("generator", None, "Study sampling, as the following flags: a generator, file, folder or hub repository.")
  cli.define_setting_flag(values)
  texts("classes", [], "Numbers or names of classes; default: all.")
  string("prompts_file", None, "Text file with one prompt per line.")
  integer("num_samples", 4, "Samples per class or prompt.", 1)
  texts("temperatures", [0.5, 1.5], "Each replaces the generator's own, as do top_ks, top_ps and guidance_scales.")
  texts("top_ks", [10, 100], "0: off.")
  texts("top_ps", [0, 0.5], "0: off.")
  texts("guidance_scales", [1, 4], "1: off.")
  texts("decoder_scales", [1, 4], "Each replaces the decoder's own guidance scale.")
  texts("decoder_step_counts", [1, 5], "Each replaces the decoder's own number of steps.")
  texts("judges", [], f"From {', '.join(JUDGES)}, besides diversity by --metrics; with --weights and --reference.")
  string("reference", None, "Statistics or images of a reference set, .npz; or a data source of the tokenizer.")
  integer("reference_images", None, "Images of a data source, at most; default: all.", 1)


def main(values: flags.FlagValues):
  """Runs values.study and writes the results to values.out."""
  chosen, out = _check_flags(values), cli.out_folder(values)
  subject = _load_subject(values)
  c = subject.config
  settings = {
    "image_size": c.image_size,
    "weights": hash_tree({}, subject.params, exact=True),
    "metrics": list(values.metrics),
    "networks": values.weights,
    "seed": c.seed,
    "sampler": c.sampler.to_dict(),
  }
  progress = Progress(out / PARTS, settings)
  given = {"checkpoint": values.checkpoint} | {name: values[name].value for name in values if values[name].present}
  given.pop("config", None)
  studies = {name: STUDIES[name](values, subject, progress) for name in chosen}  # refuses files first
  for name, study in studies.items():
    print(f"study {name}", flush=True)
    for path in study().write(out, {"settings": given | settings}, name):
      print(path)
  for path in write_document(out, list(STUDIES)):
    print(path)


def _load_subject(values: flags.FlagValues) -> Subject:
  metrics = metrics_lib.make_metrics([name for name in values.metrics if name != RFID], values.weights)
  config, params = loading.load(values.checkpoint)
  if config.stage not in TOKENIZER_STAGES:
    raise ValueError(f"--checkpoint={values.checkpoint} is a model of stage {config.stage!r}: give a tokenizer")
  if values.config is not None:
    config = from_config.with_model(values.config, config, check=loading.is_ours(values.checkpoint))
  with cli.renamed(**cli.DECODER_FLAGS):
    sampler = decoding.override_sampler(config.sampler, **cli.decoder_flags(values))
  config = with_fields(config, cli.eval_fields(values) | {f"sampler.{name}": value for name, value in sampler.items()})
  return Subject(inputs.with_present_sets(config), params, metrics, sharding.make_mesh())


def _study_tokens(values: flags.FlagValues, subject: Subject, progress: Progress) -> Callable[[], Report]:
  return functools.partial(tokens.study, progress, subject, values.metrics, values.weights)


def _study_variation(values: flags.FlagValues, subject: Subject, progress: Progress) -> Callable[[], Report]:
  return functools.partial(variation.study, progress, subject, values.num_decodes)


def _study_steps(values: flags.FlagValues, subject: Subject, progress: Progress) -> Callable[[], Report]:
  c = subject.config
  counts = sorted(set(cli.numbers("step_counts", values.step_counts, int)))
  is_student = c.stage == "distill"
  if is_student != bool(values.teacher):
    remedy = (
      "needs --teacher, the tokenizer it was distilled from" if is_student else "is not a student: leave --teacher out"
    )
    raise ValueError(f"--study=steps of --checkpoint={values.checkpoint} {remedy}")
  decoders: dict[str, steps.Decoder] = {}
  settings: dict[str, Any] = {"step_counts": counts}
  teacher = subject
  if is_student:
    config, params = loading.load(values.teacher)
    found = fingerprints.tokenizer(config, params, decoder=True)
    if found != c.distill.teacher:
      raise ValueError(
        f"--teacher={values.teacher} has fingerprint {found}, but the student at {values.checkpoint} is of teacher "
        f"{c.distill.teacher}: give that tokenizer"
      )
    fields = {f"eval.{name}": c.eval[name] for name in c.eval} | {"seed": c.seed}
    teacher = Subject(with_fields(config, fields), params, subject.metrics, subject.mesh)
    settings["teacher"] = found
    most = max(c.distill.steps)
    decoders = {f"student {n}": steps.Decoder(subject, n) for n in counts if n <= most}
  own = teacher.config.sampler.num_steps
  of_teacher = {f"teacher {n}": steps.Decoder(teacher, n) for n in sorted({own, *counts}, reverse=True)}
  return functools.partial(
    steps.study, progress, subject, f"teacher {own}", of_teacher | decoders, values.num_decodes, settings
  )


def _study_order(values: flags.FlagValues, subject: Subject, progress: Progress) -> Callable[[], Report]:
  c = subject.config
  config, params = loading.load(values.grid)
  layouts = c.tokens.layout, config.tokens.layout
  if layouts != ("registers", "grid") or config.image_size != c.image_size:
    raise ValueError(
      "--checkpoint and --grid must be tokenizers of ordered tokens and of a grid, for images of one size; their "
      f"layouts are {layouts[0]!r} and {layouts[1]!r}, their sizes {c.image_size} and {config.image_size}"
    )
  fields = {f"eval.{name}": c.eval[name] for name in c.eval} | {"seed": c.seed}
  fields |= {
    f"data.sources.{name}.{field}": x for name, source in c.data.sources.items() for field, x in source.items()
  }
  config = with_fields(config, fields)
  grid = Subject(config, params, subject.metrics, subject.mesh)
  generators, settings = {}, {"grid": hash_tree({}, params, exact=True)}
  for flag, label, tokenizer in (("generator", "ordered", subject), ("grid_generator", "grid", grid)):
    if values[flag].value:
      gen = load_ar(str(values[flag].value), mesh=subject.mesh, **cli.parse_settings(values.setting))
      gen.check_tokenizer(FlexTok(tokenizer.params, tokenizer.config), f"the tokenizer of --{flag}")
      generators[label], settings[flag] = gen, hash_tree({}, gen.params, exact=True)
  return functools.partial(order.study, progress, {"ordered": subject, "grid": grid}, generators, settings)


def _study_probe(values: flags.FlagValues, subject: Subject, progress: Progress) -> Callable[[], Report]:
  others = networks.features(values.weights)
  return functools.partial(probe.study, progress, subject, values.train_images, others)


def _study_halting(values: flags.FlagValues, subject: Subject, progress: Progress) -> Callable[[], Report]:
  metric = values.quality_metric or next(iter(subject.metrics))
  return functools.partial(halting.study, progress, subject, metric, cli.numbers("qualities", values.qualities, float))


def _study_sampling(values: flags.FlagValues, subject: Subject, progress: Progress) -> Callable[[], Report]:
  c = subject.config
  gen = load_ar(values.generator, mesh=subject.mesh, **cli.parse_settings(values.setting))
  gen.check_tokenizer(FlexTok(subject.params, c), f"--checkpoint={values.checkpoint}")
  given = prompts.read_prompts(values.prompts_file) if values.prompts_file else []
  classes = values.classes or (["all"] if gen.num_classes else [])
  conditions = prompts.read_conditions(classes, given, gen, values.generator)
  repeated = [condition for condition in conditions for _ in range(values.num_samples)]
  swept, samplers = dict(_SWEPT), dict(_SAMPLERS)
  if conditions == [None]:
    _leave_out(values, swept, "guidance_scales", "a generator without --classes or --prompts_file")
  if c.sampler.guidance == "none":
    _leave_out(values, samplers, "decoder_scales", "a decoder without guidance (see --decoder_guidance)")
  choices = _one_at_a_time(values, gen.config.ar, swept)
  settings = _one_at_a_time(values, c.sampler, samplers, "decoder ")
  for sampler in settings.values():
    decoding.override_sampler(c.sampler, num_steps=sampler["num_steps"], guidance_scale=sampler.get("guidance_scale"))

  def draw(choice):
    options = {"progress": None, "num_tokens": gen.num_tokens, **choice}
    sequences, log_probs = prompts.draw(gen, repeated, None, c.seed, c.eval.batch_size, **options)
    return *adaptive.pad_sequences(sequences, gen.num_tokens), log_probs

  asked = {
    "generator": hash_tree({}, gen.params, exact=True),
    "conditions": repeated,
    "judges": list(values.judges),
    "reference": values.reference,
    "reference_images": values.reference_images,
  }
  judges = [sampling.make_diversity(subject.compare)] if values.num_samples > 1 else []
  judges += [_make_comparison(values, subject)] if values.judges else []
  return functools.partial(sampling.study, progress, subject, draw, judges, repeated, choices, settings, asked)


STUDIES = {
  "tokens": _study_tokens,
  "variation": _study_variation,
  "halting": _study_halting,
  "steps": _study_steps,
  "order": _study_order,
  "probe": _study_probe,
  "sampling": _study_sampling,
}


def _one_at_a_time(values: flags.FlagValues, own, swept: dict, prefix: str = "") -> dict[str, dict]:
  """Returns sampling.one_at_a_time of the own settings and the values of flags {flag: (name, type)}."""
  changes = {name: cli.numbers(flag, values[flag].value or [], kind) for flag, (name, kind) in swept.items()}
  return sampling.one_at_a_time({name: own[name] for name in changes}, changes, prefix)


def _make_comparison(values: flags.FlagValues, subject: Subject) -> sampling.Judge:
  c, names = subject.config, values.judges
  extract = reference.make_extract(networks.inception(values.weights, names[0]), c.eval.batch_size, subject.mesh)
  batch_size, most = c.eval.batch_size, values.reference_images or _ALL
  open_images = from_config.reference_images(c, c.image_size, most, batch_size)
  need_images = bool(set(generation.NEED_IMAGES) & set(names))
  compared = reference.load(values.reference, open_images, extract, batch_size, need_images)
  return sampling.make_comparison(compared, extract, names, c.eval.batch_size)


def _leave_out(values: flags.FlagValues, swept: dict, flag: str, where: str):
  """Removes a flag that has no effect; ValueError if it is given."""
  if values[flag].present:
    raise ValueError(f"--{flag} has no effect with {where}: leave it out")
  del swept[flag]


def _check_flags(values: flags.FlagValues) -> list[str]:
  """Checks the flags as far as possible without a checkpoint; returns the names of the studies."""
  cli.require(values, "checkpoint", "out")
  cli.eval_fields(values)
  if jax.process_count() > 1:
    raise ValueError("a study runs in one process, on all its devices: start it on one host")
  for name in values.study:
    if name not in (*STUDIES, "all"):
      raise ValueError(f"unknown study {name!r}: one of {', '.join(STUDIES)}, or all")
  chosen = [name for name in STUDIES if name in values.study or "all" in values.study]
  if "sampling" in chosen and not values.generator:
    if "sampling" in values.study:
      raise ValueError("--study=sampling needs --generator, whose samples it studies")
    print("no --generator: the study sampling is left out", flush=True)
    chosen.remove("sampling")
  if "steps" in chosen and not ("steps" in values.study or values.teacher):
    chosen.remove("steps")
  if "order" in chosen and not values.grid:
    if "order" in values.study:
      raise ValueError("--study=order needs --grid, a tokenizer whose tokens are on a grid")
    chosen.remove("order")
  if "probe" in chosen and "probe" not in values.study:
    chosen.remove("probe")
  for studies, names in _ONLY.items():
    for name in names:
      if not set(studies) & set(chosen) and values[name].present:
        raise ValueError(
          f"--{name} is a flag of the study {' or '.join(studies)}: name it in --study"
          + (", and give --generator" if "sampling" in studies and not values.generator else "")
        )
  if not set(values.metrics) - ({RFID} if chosen != ["tokens"] else set()):
    raise ValueError(
      f"--metrics={','.join(values.metrics)} compare no two images: give at least one of {', '.join(metrics_lib.NAMES)}"
    )
  if values.quality_metric and values.quality_metric not in values.metrics:
    raise ValueError(f"--quality_metric={values.quality_metric} is not among --metrics: name it there as well")
  for swept, section in ((_SWEPT, "ar"), (_SAMPLERS, "sampler")):
    for flag, (name, kind) in swept.items():
      for value in cli.numbers(flag, values[flag].value or [], kind):
        cli.check_value(flag, f"{section}.{name}", value)
  cli.numbers("qualities", values.qualities, float)
  for name in values.judges:
    if name not in JUDGES:
      raise ValueError(f"--judges={name} is unknown: one of {', '.join(JUDGES)}")
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
