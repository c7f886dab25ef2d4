"""Evaluates a checkpoint: reconstructions at every token count, the loss of a generator, or a generator's samples.

python -m flextok_jax.evaluate --workdir=DIR [--config=NAME] [--checkpoint=PATH] [--num_tokens=1,2,4]
    [--data=FOLDER | --images=FOLDER]
    [--metrics=psnr,ssim,mae,lpips_alex,lpips_vgg,dreamsim,dinov2,rfid --weights=DIR]
    [--resize=crop|fit|none --posemb_scaling=interpolate]
python -m flextok_jax.evaluate --checkpoint=GENERATOR --tokenizer=PATH --metrics=gfid,sfid,is,precision,recall,top1
    --weights=DIR --reference=FILE.npz|FOLDER|SOURCE [--num_images=50000] [--classes=0,3,7 | --prompts_file=FILE]
    [--num_tokens=1,4,16] [--guidance_scale=...] [--samples_npz] --out=DIR
python -m flextok_jax.evaluate --save_reference=FILE.npz --reference=FOLDER|SOURCE|FILE.npz --weights=DIR
    [--image_size=256 | --config=NAME] [--reference_images=N]

A tokenizer or VAE is evaluated by its reconstructions of held-out images, those of --data, or of all in --images; a
generator by its loss on held-out tokens, or with --tokenizer and --metrics by its samples. Without a checkpoint
--save_reference writes the statistics of a reference set alone.

Prints a table; writes report.json, curve.png (or loss.png) and grid_<set>.png, and appends the report to eval.jsonl.
An interrupted evaluation resumes when it is run again with the same flags.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
import numpy as np

from flextok_jax import cli
from flextok_jax.config import with_fields
from flextok_jax.core import json_lines, workdirs
from flextok_jax.core.hashing import hash_tree
from flextok_jax.evals import from_config, generation
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.metrics import reference
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.reconstruction import RFID
from flextok_jax.evals.report import Report
from flextok_jax.inference import decoding, prompts
from flextok_jax.inference.generator import load_ar
from flextok_jax.parallel import batching, processes, sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs
from flextok_jax.weights import loading
from flextok_jax.weights.perception import networks

_NUM_SAMPLES = 50_000  # usual in the literature
_BATCH_SIZE = 64  # samples
_ALL = np.iinfo(np.int32).max  # images
_OF_REFERENCE = ("reference", "save_reference", "reference_images", "image_size", "config", "weights", "batch_size")
_PARTIAL = "so_far"  # folder of partial results


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  cli.define_config_flag("Settings of data, eval and sampler; default: the checkpoint's own.", values)
  cli.define_data_flag(values)
  flags.DEFINE_string(
    "workdir", None, "The run's directory: its newest checkpoint, and DIR/eval for results.", flag_values=values
  )
  flags.DEFINE_string(
    "checkpoint", None, "Another checkpoint to evaluate: file, folder or hub repository.", flag_values=values
  )
  flags.DEFINE_string("images", None, "A folder of pictures to evaluate on, on all of them.", flag_values=values)
  flags.DEFINE_list("num_tokens", [], "Token counts; default: config.eval.num_tokens.", flag_values=values)
  flags.DEFINE_list("sources", [], "Evaluation sets; default: config.eval.sources.", flag_values=values)
  flags.DEFINE_integer(
    "num_images", None, "Images per set; default: config.eval.num_images, or 50000 samples.", 1, flag_values=values
  )
  flags.DEFINE_integer(
    "seed", None, "Of noises and samples; default: config.seed, or 0.", 0, 2**32 - 1, flag_values=values
  )
  flags.DEFINE_string("out", None, "Folder for the results; default: WORKDIR/eval.", flag_values=values)
  flags.DEFINE_integer(
    "batch_size", None, "Images per batch; default: config.eval.batch_size, or 64 samples.", 1, flag_values=values
  )
  flags.DEFINE_list(
    "metrics",
    [],
    f"Of images: {', '.join((*metrics_lib.NAMES, RFID))}; default: psnr, ssim, mae. "
    f"Of samples: {', '.join(generation.NAMES)}.",
    flag_values=values,
  )
  flags.DEFINE_string("weights", None, "Folder with the weights of the metrics' networks.", flag_values=values)
  cli.define_resize_flag(values, "Of images whose reconstructions are measured. ")
  cli.define_posemb_flag(values)
  cli.define_tile_flag(values)
  flags.DEFINE_integer("keep_every", 50, "Batches between two writes of partial results.", 1, flag_values=values)
  _define_sample_flags(values)


def _define_sample_flags(values: flags.FlagValues):
  """Defines the flags for samples of a generator."""
  cli.define_draw_flags(values)
  flags.DEFINE_string(
    "reference",
    None,
    "Statistics or images of a reference set, .npz; a folder of pictures; or the name of one of the data sources of "
    "the tokenizer or --config, whose held-out images are the reference.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "reference_images", None, "Images of a folder or data source, at most; default: all.", 1, flag_values=values
  )
  flags.DEFINE_string("save_reference", None, "File for the statistics of the reference, .npz.", flag_values=values)
  flags.DEFINE_integer(
    "image_size", None, "Of the reference without a checkpoint; default: that of --config.", 1, flag_values=values
  )
  flags.DEFINE_bool(
    "samples_npz", False, "Write samples_<tokens>.npz too, arr_0 uint8 [n, h, w, 3].", flag_values=values
  )


def main(values: flags.FlagValues):
  """Evaluates a checkpoint and writes its report, or writes the statistics of a reference set."""
  if values.save_reference and not values.checkpoint and not values.workdir:
    _write_reference(values)
    return
  if values.image_size:
    raise ValueError("--image_size has no meaning with a checkpoint, which has its own")
  if not values.checkpoint and not values.workdir:
    raise ValueError("nothing to evaluate: give --workdir or --checkpoint")
  if not values.out and not values.workdir:
    raise ValueError("nowhere to write: give --out or --workdir")
  what = "--out" if values.out else "--workdir"
  folder = workdirs.resolve(values.out or os.path.join(values.workdir, "eval"), what)
  of_samples = flags.FlagValues()
  _define_sample_flags(of_samples)
  of_images = ("config", "images", "sources", "resize", "posemb_scaling", "vae_tile")
  for name in of_images if values.tokenizer else of_samples:
    if values[name].present:
      raise ValueError(
        f"--{name} has no meaning {'with' if values.tokenizer else 'without'} --tokenizer, which asks"
        " for samples of a generator"
      )
  check_writable = workdirs.check_writable if workdirs.is_remote(folder) else cli.new_folder
  processes.run_on_process_0(lambda: check_writable(folder, what))
  evaluate = _evaluate_samples if values.tokenizer else _evaluate_checkpoint
  with contextlib.closing(workdirs.Outputs(folder, ["eval.jsonl", _PARTIAL])) as outputs:
    report, settings, progress = evaluate(values, outputs.path)
    if not processes.is_process_0():
      return
    paths = report.write(outputs.path, settings)
    with contextlib.closing(json_lines.JsonLines(outputs.path / "eval.jsonl")) as lines:
      lines.write({**settings, **report.scores})
    progress.clear()
  print(report.table() + "\n")
  for path in (*paths, outputs.path / "eval.jsonl"):
    print(folder / path.relative_to(outputs.path))


def _evaluate_checkpoint(values: flags.FlagValues, out: Path) -> tuple[Report, dict[str, Any], Progress]:
  """Returns the report of a checkpoint, the settings to write with it, and its partial results."""
  source, fields = values.checkpoint or values.workdir, cli.eval_fields(values)
  mesh = sharding.make_mesh()  # all devices, whatever the training had
  config, params = loading.load(source, mesh=mesh, posemb_scaling=values.posemb_scaling, vae_tile=values.vae_tile)
  if values.config is not None:
    check = loading.is_ours(source) and values.posemb_scaling is None and values.vae_tile is None
    config = from_config.with_model(values.config, config, check=check)
  config = _on_images(cli.with_data(config, values), values)
  for name in ("num_tokens", "sources"):
    if values[name].value and config.stage == "ar":
      raise ValueError(f"--{name} has no meaning for a generator: its loss is over all tokens of config.data.tokens")
  if config.stage == "vae" and values.num_tokens:
    raise ValueError("--num_tokens has no meaning for a model of stage 'vae', which has no tokens")
  config = inputs.with_present_sets(with_fields(config, fields))
  settings = {"weights": hash_tree({}, params, exact=True), "networks": values.weights, "config": config.to_dict()}
  progress = Progress(
    out / _PARTIAL, settings | {"metrics": values.metrics, "resize": values.resize}, values.keep_every
  )
  report = from_config.evaluate(config, params, values.metrics, values.weights, progress, values.resize)
  written = {"checkpoint": str(source), "image_size": config.image_size}
  if values.resize != "crop":
    written["resize"] = values.resize
  if report.scores.get("num_tokens"):  # images were decoded
    written["sampler"] = config.sampler.to_dict()
  return report, written, progress


def _on_images(config: ConfigDict, values: flags.FlagValues) -> ConfigDict:
  """Returns a config whose evaluation reads all pictures of the folder --images; unchanged without --images."""
  if not values.images:
    return config
  for name in ("data", "sources"):
    if values[name].value:
      raise ValueError(f"--images={values.images} and --{name} are both given: give one of them")
  if config.stage == "ar":
    raise ValueError(f"--images={values.images} has no meaning for a generator: its loss is over tokens")
  fields = {"data.sources.folder.path": "", "data.sources.folder.val_path": values.images}
  return with_fields(config, fields | {"eval.sources": ("folder",), "eval.num_images": _ALL})


def _evaluate_samples(values: flags.FlagValues, out: Path) -> tuple[Report, dict[str, Any], Progress]:
  """Returns the report of samples, the settings to write with it, and its partial results."""
  names, num_images = values.metrics, values.num_images or _NUM_SAMPLES
  if not names:
    raise ValueError(f"--metrics is missing: of samples there are {', '.join(generation.NAMES)}")
  for name in names:
    if name not in generation.NAMES:
      raise ValueError(f"--metrics={name} is not a metric of samples: these are {', '.join(generation.NAMES)}")
    if name in generation.NEED_REFERENCE and not values.reference:
      raise ValueError(
        f"--metrics={name} needs --reference: a .npz of statistics or images, a folder, or a data source"
      )
  if values.prompts_file and values.classes:
    raise ValueError("--classes and --prompts_file are both given: give one of them")
  save_reference = _reference_file(values) if values.save_reference else None

  # The generator, its tokenizer, and what they are to draw.
  mesh, source, seed = sharding.make_mesh(), values.checkpoint or values.workdir, values.seed or 0
  gen = load_ar(source, mesh=mesh, **cli.parse_settings(values.setting))
  texts = prompts.read_prompts(values.prompts_file) if values.prompts_file else []
  classes = values.classes or (["all"] if gen.num_classes else [])
  conditions = prompts.read_conditions(classes, texts, gen, source)
  choices = prompts.sampling_choices(gen, conditions != [None], **cli.choice_flags(values))
  with cli.renamed(**cli.DECODER_FLAGS):
    tokenizer = prompts.load_matching_tokenizer(values.tokenizer, gen, **cli.decoder_flags(values))
  config, params = tokenizer.config, tokenizer.params
  counts = decoding.token_counts(cli.numbers("num_tokens", values.num_tokens), gen.num_tokens)
  draw = generation.make_draw(gen, conditions, seed, mesh, num_tokens=counts[-1], **choices)
  decode = decoding.decoder_by_image(make_stage(config).predict_fns["detokenize"], seed)

  # What the samples are compared with.
  nets, targets = generation.make_networks(names, values.weights, conditions)
  batch_size = values.batch_size or _BATCH_SIZE
  compared = None
  if set(names) & set(generation.NEED_REFERENCE):
    extract = reference.make_extract(nets["inception"], batch_size, mesh)
    most = values.reference_images or _ALL
    open_images = from_config.reference_images(config, config.image_size, most, batch_size)
    need_images = bool(set(names) & set(generation.NEED_IMAGES))
    compared = reference.load(values.reference, open_images, extract, batch_size, need_images)
    for name, layer in generation.LAYERS.items():
      if name in names and layer not in compared.gaussians:
        raise ValueError(f"--metrics={name}: {values.reference} has no statistics of these features")
    if save_reference and processes.is_process_0():
      reference.save(save_reference, compared)

  written = {
    "checkpoint": source,
    "tokenizer": values.tokenizer,
    "reference": values.reference,
    "weights": values.weights,
    "seed": seed,
    "num_tokens": list(counts),
    "conditions": len(conditions),
    **choices,
    "decoder": config.sampler.to_dict(),
  }
  models = [hash_tree({}, x, exact=True) for x in (params, gen.params, nets)]
  progress = Progress(
    out / _PARTIAL,
    written | {"models": models, "metrics": names, "all": conditions, "num_images": num_images},
    values.keep_every,
  )
  folder = out if values.samples_npz else None
  evaluator = generation.Generation(
    draw,
    decode,
    gen.num_ids,
    tokenizer.num_registers,
    tokenizer.image_size,
    generation.Settings(names, counts, num_images, batch_size, seed, folder=folder),
    nets,
    targets,
    compared,
    mesh,
    progress,
  )
  return evaluator.run(batching.replicate(params, mesh)), written, progress


def _reference_file(values: flags.FlagValues) -> Path:
  if not values.save_reference.endswith(".npz"):
    raise ValueError(f"--save_reference={values.save_reference}: the name must end in .npz")
  return cli.new_file(values.save_reference, "--save_reference")


def _write_reference(values: flags.FlagValues):
  """Writes the statistics of values.reference to values.save_reference."""
  given = flags.FlagValues()
  define_flags(given)
  for name in set(given) - set(_OF_REFERENCE):
    if values[name].present:
      raise ValueError(f"--{name} has no meaning for the statistics of a reference alone: give a checkpoint, too")
  cli.require(values, "reference")
  path = _reference_file(values)
  batch_size, config = values.batch_size or _BATCH_SIZE, values.config
  image_size = values.image_size or (config.image_size if config is not None else None)
  extract = reference.make_extract(networks.inception(values.weights, "gfid"), batch_size, sharding.make_mesh())
  open_images = from_config.reference_images(config, image_size, values.reference_images or _ALL, batch_size)
  found = reference.load(values.reference, open_images, extract, batch_size, need_images=False)
  if processes.is_process_0():
    reference.save(path, found)
    print(f"wrote {path}: statistics of {found.num_images or 'an unknown number of'} images")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
