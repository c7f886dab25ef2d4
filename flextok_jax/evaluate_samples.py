"""What python -m flextok_jax.evaluate does with a generator and metrics of samples.

python -m flextok_jax.evaluate --checkpoint=GENERATOR --tokenizer=PATH --metrics=gfid,sfid,is,precision,recall,top1
    --weights=DIR --reference=FILE.npz [--num_images=50000] [--classes=0,3,7 | --prompts_file=FILE]
    [--num_tokens=1,4,16] [--guidance_scale=...] [--samples_npz] --out=DIR
"""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

from absl import flags
import jax
import numpy as np

from flextok_jax import cli
from flextok_jax.data import pipeline
from flextok_jax.evals import generation, progress, reconstruction
from flextok_jax.evals.metrics import reference
from flextok_jax.inference import decoding
from flextok_jax.inference import generator as generators
from flextok_jax.inference import prompts as prompts_lib
from flextok_jax.parallel import processes, sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs
from flextok_jax.weights.perception import networks

_NUM_IMAGES = 50_000  # that the field reports
_BATCH_SIZE = 64


def define_flags(values: flags.FlagValues):
  """Defines the flags that are of samples alone."""
  cli.define_draw_flags(values)
  flags.DEFINE_string(
    "reference",
    None,
    "Statistics or images of a reference set, .npz; or the name of one of the "
    "tokenizer's data sources, whose held-out images then are the reference.",
    flag_values=values,
  )
  flags.DEFINE_integer("reference_images", None, "Of a data source at most; default: all.", 1, flag_values=values)
  flags.DEFINE_string("save_reference", None, "File for the statistics of the reference, .npz.", flag_values=values)
  flags.DEFINE_bool(
    "samples_npz", False, "Write samples_<tokens>.npz too, arr_0 uint8 [n, h, w, 3].", flag_values=values
  )


def evaluate(values: flags.FlagValues, out: Path) -> tuple[reconstruction.Report, dict[str, Any], progress.Progress]:
  """Returns the report of samples, the settings that it depends on, and what was kept on the way.

  Raises:
    ValueError: a flag that is missing or out of range, before anything is drawn.
  """
  names, num_images = values.metrics, values.num_images or _NUM_IMAGES
  if not names:
    raise ValueError(f"--metrics is missing: of samples there are {', '.join(generation.NAMES)}")
  for name in names:
    if name not in generation.NAMES:
      raise ValueError(f"--metrics={name} is not of samples: these are {', '.join(generation.NAMES)}")
  needed = [name for name in names if name in generation.NEED_REFERENCE]
  if needed and not values.reference:
    raise ValueError(f"--metrics={needed[0]} needs --reference: a .npz of statistics or images, or a data source")
  if values.prompts_file and values.classes:
    raise ValueError("--classes and --prompts_file are both given: give one of them")
  prompts = prompts_lib.read_prompts(values.prompts_file) if values.prompts_file else []
  mesh, source = sharding.make_mesh(), values.checkpoint or values.workdir
  gen = generators.load_ar(source, mesh=mesh, **cli.parse_settings(values.setting))
  if gen.num_classes and not values.classes:
    values.classes = ["all"]
  conditions = prompts_lib.read_conditions(values.classes, prompts, gen, values.checkpoint)
  choices = prompts_lib.sampling_choices(gen, conditions != [None], **cli.choice_flags(values))
  with cli.renamed(**cli.DECODER_FLAGS):
    tokenizer = prompts_lib.load_tokenizer(values.tokenizer, gen, **cli.decoder_flags(values))
  config, params = tokenizer.config, tokenizer.params
  counts = decoding.token_counts(cli.numbers("num_tokens", values.num_tokens), gen.num_tokens)
  nets, facts = _networks(names, values.weights, conditions)
  size = -(-(values.batch_size or _BATCH_SIZE) // mesh.size) * mesh.size
  compared = None
  if needed:
    look = reference.make_look(nets["inception"], size, mesh)
    compared = load_reference(
      values.reference, values.reference_images, config, look, size, bool(set(names) & set(generation.NEED_IMAGES))
    )
    for metric, layer in (("gfid", "pool"), ("sfid", "spatial"), ("fid_infinity", "pool")):
      if metric in names and layer not in compared.gaussians:
        raise ValueError(f"--metrics={metric}: {values.reference} has no statistics of these features")
    if values.save_reference and processes.is_process_0():
      reference.save(values.save_reference, compared)

  seed = values.seed or 0
  decode = decoding.decoder_by_image(make_stage(config).predict_fns["detokenize"], seed)

  fold = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))

  def draw(rows: np.ndarray) -> jax.Array:
    given = [conditions[i % len(conditions)] for i in rows]
    condition = {} if given[0] is None else {"prompts" if isinstance(given[0], str) else "labels": given}
    keys = fold(jax.random.key(seed), sharding.place(rows, sharding.batch_sharding(mesh)))
    return gen.generate(keys, **condition, num_tokens=counts[-1], **choices)

  settings = {
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
  identity = [progress.identity(x) for x in (params, gen.params, nets)]
  kept = progress.Progress(
    out / "so_far",
    settings | {"identity": identity, "metrics": names, "all": conditions, "num_images": num_images},
    values.keep_every,
  )
  evaluator = generation.Generation(
    draw,
    decode,
    gen.num_ids,
    config.tokens.num_registers,
    config.image_size,
    counts,
    names,
    nets,
    facts,
    compared,
    mesh,
    kept,
    out if values.samples_npz else None,
  )
  params = sharding.place(params, sharding.replicated(mesh))
  return evaluator.run(params, num_images, size, seed), settings, kept


def _networks(names: list[str], weights: str | None, conditions: list) -> tuple[dict, Any]:
  """Returns the networks that metrics need, and a function from rows to what is known of them."""
  nets, kind = {}, type(conditions[0])
  if set(names) & set(generation.INCEPTION):
    nets["inception"] = networks.inception(weights, next(name for name in names if name in generation.INCEPTION))
  if "top1" in names:
    if kind is not int:
      raise ValueError("--metrics=top1 asks whether samples are of their class: it is of class-conditional generators")
    nets["classifier"] = networks.classifier(weights, "top1")
  texts = None
  if "clip" in names:
    if kind is not str:
      raise ValueError("--metrics=clip compares samples with their texts: give --prompts_file")
    nets["clip"], encode = networks.clip(weights, "clip")
    texts = encode(conditions)

  def facts(rows: np.ndarray) -> dict[str, np.ndarray]:
    which = rows % len(conditions)
    found = {"labels": np.array([conditions[i] for i in which], np.int32)} if kind is int else {}
    return found | ({} if texts is None else {"texts": texts[which]})

  return nets, facts


def load_reference(
  name: str, num_images: int | None, config, look: Callable, batch_size: int, images: bool
) -> reference.Reference:
  """Returns the reference that a name stands for.

  Args:
    name: of a .npz file, or of a data source of config, the tokenizer's.
    num_images: of a data source at most; None: all.
    look, batch_size: of reference.make_look.
    images: whether features of single images are needed.
  """
  if name.endswith(".npz"):
    return reference.load(name, look, batch_size, images)
  most = num_images or np.iinfo(np.int32).max
  held_out = pipeline.EvalImages(inputs.image_data(config), name, image_size=config.image_size, num_images=most)
  batches = (held_out[start : start + batch_size] for start in range(0, len(held_out), batch_size))
  found = reference.look_at(batches, look)
  return found if images else dataclasses.replace(found, pools=None)
