"""Searches for the tokens whose pictures a verifier scores best: beam search, lookahead or best-of-N.

python -m flextok_jax.search --tokenizer=PATH --out=DIR [--checkpoint=GENERATOR] --verifier=clip,likelihood
    [--classes=0,3 | --prompts="a red star;two blue rings" | --prompts_file=FILE] [--references=FILES_OR_FOLDERS]
    [--size=HEIGHT,WIDTH --posemb_scaling=interpolate]
    [--algorithm=beam|lookahead|best_of_n] [--beam_width=5] [--candidates=10] [--schedule=geometric|linear|fixed|1,2,8]

Without --checkpoint codes are drawn uniformly, and the verifier alone decides. With --references, the images to which
the verifiers psnr, lpips, dreamsim and dinov2 compare, there is one search per image: a better encoder.

Writes one PNG file per result; tokens.json, which flextok_jax.detokenize reads; search.json with settings, scores and
the best sequence after each step; and grid.png, one row per search: the best picture after each step, and the results.

Results are kept in DIR/parts: an interrupted search resumes when it is run again. Several processes (launch/local.sh,
srun, a TPU slice) divide the searches. Search i depends on the seed, its condition and i alone.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np

from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.core.hashing import hash_tree
from flextok_jax.core.progress import track
from flextok_jax.evals import grids
from flextok_jax.evals.progress import Progress
from flextok_jax.inference import image_files, prompts, search_plan, token_files, validation, verifiers
from flextok_jax.inference import search as search_lib
from flextok_jax.inference.generator import ARGenerator, load_ar
from flextok_jax.inference.tokenizer import FlexTok, load_tokenizer, with_positions
from flextok_jax.parallel import processes

PARTS = "parts"  # folder of partial results
_PER_PART = 8  # searches


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  texts = functools.partial(flags.DEFINE_list, flag_values=values)
  boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
  cli.define_draw_flags(values)
  cli.define_size_flags(values)
  string("checkpoint", None, "A generator: file, folder or hub repository; default: uniform codes.")
  string("out", None, "Folder for the results.")
  string("prompts", None, "Texts, separated by semicolons.")
  texts("verifier", ["likelihood"], f"From {', '.join(verifiers.NAMES)}; several are an ensemble.")
  texts("verifier_weights", [], "A weight for each verifier; default: 1.")
  flags.DEFINE_enum("ensemble", "rank", verifiers.MODES, "How several verifiers are joined.", flag_values=values)
  string("weights", None, "Folder with the verifiers' networks.")
  texts("references", [], "Image files and folders, one search each.")
  own = search_plan.Settings()
  flags.DEFINE_enum("algorithm", own.algorithm, search_plan.ALGORITHMS, "How to search.", flag_values=values)
  integer("beam_width", own.beam_width, "Beams that are kept after each step.", 1)
  integer("candidates", own.candidates, "Candidates of each beam in a step; of best_of_n all samples.", 1)
  string(
    "schedule", own.schedule, f"Tokens after each step: {', '.join(search_plan.SCHEDULES)}, or counts such as 1,2,8."
  )
  integer("steps", own.steps, "Steps at most.", 1)
  integer("tokens_per_step", None, "Of --schedule=linear; default: all tokens divided by --steps.", 1)
  integer("lookahead", own.lookahead, "Tokens by which lookahead extends candidates; -1: all.", -1)
  integer("max_lookahead_step", own.max_lookahead_step, "Steps from 0 below which it does; -1: all.", -1)
  flags.DEFINE_enum(
    "branching",
    own.branching,
    search_plan.BRANCHINGS,
    "Token of a step from which candidates differ.",
    flag_values=values,
  )
  boolean("replacement", own.replacement, "Whether a beam may draw the same token twice.")
  integer("num_results", own.num_results, "Results per search, best first.", 1)
  integer("seed", 0, "Of the tokens and of the decoder's noise.")
  integer("batch_size", own.batch_size, "Candidates at once, about.", 1)
  integer("grid_rows", 16, "Searches in the grid at most; 0: no grid.", 0)


@dataclasses.dataclass(frozen=True)
class _Job:
  """What is searched for: the conditions and reference images of all searches, and how."""

  gen: ARGenerator | None
  tokenizer: FlexTok
  conditions: list[prompts.Condition]  # one per search
  texts: list[str] | None  # for the verifier, one per search
  references: np.ndarray | None  # uint8, one per search
  keys: jax.Array  # one per search
  settings: dict[str, Any]  # of search, with the verifier
  size: tuple[int, int] | None  # of the pictures

  def run(self, first: int, end: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns (facts, arrays) of the searches first .. end - 1."""
    rows = slice(first, end)
    given = dict(self.settings)
    if self.references is not None:
      given["references"] = self.references[rows]
    conditions, texts = self.conditions[rows], self.texts and self.texts[rows]
    if self.gen is None:
      found = search_lib.UniformPrior(self.tokenizer).search(self.keys[rows], prompts=texts, size=self.size, **given)
    else:
      condition: dict[str, Any] = {}
      if conditions[0] is not None:
        condition = {"prompts" if isinstance(conditions[0], str) else "labels": conditions}
      found = self.gen.search(
        self.keys[rows], self.tokenizer, verifier_prompts=texts, size=self.size, **condition, **given
      )
    assert found.images is not None
    arrays = {"ids": found.ids, "scores": found.scores, "images": _to_uint8(found.images)}
    stop = self.gen.stop_id if self.gen else None
    for i, step in enumerate(found.steps):
      arrays |= {f"step{i}_ids": step.ids[:, 0], f"step{i}_scores": step.scores[:, 0]}
      # [p, tokens] -> [p, h, w, 3]
      arrays[f"step{i}_images"] = _to_uint8(
        search_lib.decode(self.tokenizer, step.ids[:, 0], stop, self.keys[rows], 32, self.size)
      )
    return {"decoded": found.decoded, "steps": len(found.steps)}, arrays


def main(values: flags.FlagValues):
  """Searches, and writes what the module's docstring lists under values.out."""
  texts = _check_flags(values)
  out = cli.out_folder(values)
  gen, tokenizer = _load(values)
  job = _make_job(values, texts, gen, tokenizer)
  settings = {name: values[name].value for name in ("checkpoint", "tokenizer", "seed")}
  settings |= {name: value for name, value in job.settings.items() if name != "verifier"}
  settings |= {"verifier": dict(zip(values.verifier, _weights(values))), "decoder": tokenizer.config.sampler.to_dict()}
  depends = settings | {
    "conditions": job.conditions,
    "size": job.size,
    "posemb_scaling": tokenizer.config.decoder.posemb_scaling,
    "texts": job.texts,
    "models": hash_tree({}, [tokenizer.params, {} if gen is None else gen.params], exact=True),
    "references": None if job.references is None else hash_tree({}, {"images": job.references}, exact=True),
  }
  progress = Progress(out / PARTS, depends)

  # Each process takes every n-th part.
  starts = list(range(0, len(job.conditions), _PER_PART))
  part = lambda first: progress.compute(
    f"searches_{first}", {}, lambda: job.run(first, min(first + _PER_PART, len(job.conditions)))
  )
  own = starts[jax.process_index() :: jax.process_count()]
  size = lambda first: min(_PER_PART, len(job.conditions) - first)
  for first in track(own, sum(map(size, own)), "searches", size=size):
    part(first)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("search")
  if not processes.is_process_0():
    return
  facts, arrays = zip(*(part(first) for first in starts))
  whole = {name: np.concatenate([found[name] for found in arrays]) for name in arrays[0]}
  _write(values, out, job, settings, facts[0], whole)


def _write(
  values: flags.FlagValues,
  out: Path,
  job: _Job,
  settings: dict[str, Any],
  facts: dict[str, Any],
  found: dict[str, np.ndarray],
):
  """Writes pictures, lists and grid of all searches."""
  count, results = found["ids"].shape[:2]
  stop = job.gen.stop_id if job.gen else None
  cut = lambda ids: [int(i) for i in ids if i != stop]
  searches, entries = [], []
  for i in range(count):
    name = _name(job, i)
    listed = []
    for j in range(results):
      file = f"{i:05d}_{j}_{name}.png"
      files.write_file(out / file, grids.to_png(found["images"][i, j]))
      entries.append((f"{name}_{i}_{j}", cut(found["ids"][i, j])))
      listed.append({"file": file, "score": float(found["scores"][i, j]), "length": len(entries[-1][1])})
    steps = [
      {"token_ids": cut(found[f"step{k}_ids"][i]), "score": float(found[f"step{k}_scores"][i])}
      for k in range(facts["steps"])
    ]
    searches.append(
      {"condition": job.conditions[i], "text": job.texts and job.texts[i], "results": listed, "steps": steps}
    )
  document = {"settings": settings, "decoded_per_search": facts["decoded"], "searches": searches}
  tokens = token_files.Facts(job.tokenizer.fingerprint, job.tokenizer.image_size, found["ids"].shape[2])
  outputs = {
    "tokens.json": token_files.to_json(tokens, entries, None if job.size is None else [job.size] * len(entries)),
    "search.json": (json.dumps(document, indent=1) + "\n").encode(),
  }
  rows = min(values.grid_rows, count)
  if rows:
    labels = [str(job.texts[i] if job.texts else _name(job, i)) for i in range(rows)]
    columns: list[Any] = [labels]
    titles = [""]
    if job.references is not None:
      columns.append(job.references[:rows])
      titles.append("reference")
    for k in range(facts["steps"]):
      columns.append(found[f"step{k}_images"][:rows])
      titles.append(str(found[f"step{k}_ids"].shape[1]))
    for j in range(results):
      columns.append(found["images"][:rows, j])
      titles.append(f"result {j + 1}" if results > 1 else "result")
    outputs["grid.png"] = grids.to_png(grids.grid(columns, titles))
  for name, content in outputs.items():
    files.write_file(out / name, content)
  print(f"wrote to {out}: {count * results} pictures, {', '.join(outputs)}")


def _name(job: _Job, i: int) -> str:
  name = prompts.condition_name(job.conditions[i] if job.texts is None else job.texts[i])
  return files.shorten(name) or "unconditional"


_to_uint8 = lambda images: np.asarray(images_lib.as_uint8(images))


def _load(values: flags.FlagValues) -> tuple[ARGenerator | None, FlexTok]:
  with cli.renamed(**cli.DECODER_FLAGS):
    if values.checkpoint is None:
      tokenizer = load_tokenizer(values.tokenizer, vae_tile=values.vae_tile, **cli.decoder_flags(values))
      return None, with_positions(tokenizer, values.posemb_scaling, ("decoder",))
    gen = load_ar(values.checkpoint, **cli.parse_settings(values.setting))
    options = dict(posemb_scaling=values.posemb_scaling, vae_tile=values.vae_tile) | cli.decoder_flags(values)
    return gen, prompts.load_matching_tokenizer(values.tokenizer, gen, **options)


def _make_job(values: flags.FlagValues, texts: list[str], gen: ARGenerator | None, tokenizer: FlexTok) -> _Job:
  size = cli.parse_size(values)
  if size is not None:
    tokenizer.latent_shape_of(size)  # raises for a size that it cannot decode
  references = image_files.load_crops(values.references, tokenizer, size)[0] if values.references else None
  told: list[str] | None = texts or None
  if gen is None:
    conditions: list[prompts.Condition] = list(texts) or [None]
  else:
    text_generator = gen.config.ar.condition == "text"
    conditions = prompts.read_conditions(values.classes, texts if text_generator else [], gen, str(values.checkpoint))
    if texts and not text_generator and conditions == [None]:
      conditions = [None] * len(texts)
  number = max(len(conditions), len(references) if references is not None else 1, len(texts))
  for name, items in (("conditions", conditions), ("prompts", texts), ("references", references)):
    if items is not None and len(items) not in (0, 1, number):
      raise ValueError(f"{len(items)} {name} for {number} searches: give one for all, or one for each")
  repeat = lambda items: items if len(items) == number else list(items) * number
  settings = {name: values[name].value for name in (*_SETTINGS, "ensemble", "weights")}
  schedule = values.schedule
  if schedule not in search_plan.SCHEDULES:
    settings["schedule"] = tuple(cli.numbers("schedule", schedule.split(",")))
  weights = _weights(values)
  verifier: Any = values.verifier[0] if len(values.verifier) == 1 else dict(zip(values.verifier, weights))
  settings["verifier"] = verifier
  if gen is not None:
    settings |= prompts.sampling_choices(gen, conditions != [None] * number, **cli.choice_flags(values))
  else:
    for name in ("greedy", "guidance_scale", "temperature", "top_k", "top_p"):
      if values[name].present:
        raise ValueError(f"--{name} has no effect without --checkpoint: codes are drawn uniformly")
  keys = validation.keys(jax.random.key(values.seed), number)
  if references is not None and len(references) != number:
    references = np.repeat(references, number, 0)
  return _Job(gen, tokenizer, repeat(conditions), told and repeat(told), references, keys, settings, size)


_SETTINGS = (
  *("algorithm", "beam_width", "candidates", "schedule", "steps", "tokens_per_step", "lookahead", "max_lookahead_step"),
  *("branching", "replacement", "num_results", "batch_size"),
)


def _weights(values: flags.FlagValues) -> list[float]:
  return cli.numbers("verifier_weights", values.verifier_weights, float) or [1.0] * len(values.verifier)


def _check_flags(values: flags.FlagValues) -> list[str]:
  """Checks what can be checked without a checkpoint, and returns the prompts."""
  cli.require(values, "tokenizer", "out")
  cli.out_folder(values)
  validation.seed(values.seed)
  given = [f"--{name}" for name in ("classes", "prompts", "prompts_file") if values[name].present]
  if "--prompts" in given and "--prompts_file" in given:
    raise ValueError("--prompts and --prompts_file are both given: give one of them")
  for name in values.verifier:
    if name not in verifiers.NAMES:
      raise ValueError(f"--verifier={name} must be one of {', '.join(verifiers.NAMES)}")
  if len(_weights(values)) != len(values.verifier):
    raise ValueError(f"--verifier_weights has {len(_weights(values))} numbers for {len(values.verifier)} verifiers")
  return prompts.read_texts(values.prompts, values.prompts_file)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
