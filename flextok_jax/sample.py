"""Draws images: token ids by a generator, turned into pictures by the tokenizer that they belong to.

python -m flextok_jax.sample --checkpoint=GENERATOR --tokenizer=PATH --out=DIR
    [--classes=0,3,7 | --classes=all | --prompts="a red star;two blue rings" | --prompts_file=FILE]
    [--prefix_images=FILES_OR_FOLDERS --prefix_tokens=K] [--num_samples=N] [--num_tokens=N]

Writes a PNG file a sample; tokens.json, which flextok_jax.detokenize reads (with the same settings it gives the same
pictures); samples.json with settings, conditions, lengths and log-probabilities; grid.png, a row a sample and a column
a number of tokens, framed where the sample has fewer; strip.png, the first sample token by token; and with --npz
samples.npz, arr_0 uint8 [n, h, w, 3].
Sample i depends on the seed, its condition and i alone.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import json
from pathlib import Path
import re
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax import cli, detokenize, tokenize
from flextok_jax.core import files
from flextok_jax.data import transforms
from flextok_jax.evals import plots, reconstruction
from flextok_jax.inference import generator as generation
from flextok_jax.ops import fsq, guidance, nested
from flextok_jax.stages import make_stage
from flextok_jax.weights import fingerprint, loading

_NAME_LENGTH = 40  # characters of a prompt in a file's name


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  define_draw_flags(values)
  string("checkpoint", None, "A generator: file, folder or hub repository.")
  string("out", None, "Folder for the results.")
  string("prompts", None, "Texts, separated by semicolons.")
  integer("num_samples", 1, "Samples a class, prompt and image.", 1)
  flags.DEFINE_list("prefix_images", [], "Image files and folders, whose first tokens are kept.", flag_values=values)
  integer("prefix_tokens", None, "How many are kept; the others are drawn.", 1)
  integer("num_tokens", None, "Tokens a sample at most; default: the model's.", 1)
  integer("seed", 0, "Of the tokens and the decoder's noise.")
  integer("batch_size", 32, "Samples at once.", 1)
  flags.DEFINE_list("counts", [], "Token counts, the columns of the grid; default: powers of two.", flag_values=values)
  integer("grid_rows", 16, "Samples in the grid at most, equally many of each condition; 0: no grid.", 0)
  integer("strip_tokens", 32, "Pictures in the strip at most; 0: no strip.", 0)
  flags.DEFINE_bool("npz", False, "Write samples.npz too.", flag_values=values)


def define_draw_flags(values: flags.FlagValues):
  """Defines what commands that draw samples have in common: the tokenizer, conditions, choices of tokens, decoder."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  real = functools.partial(flags.DEFINE_float, flag_values=values)
  string("tokenizer", None, "The tokenizer whose ids it was trained on: file, folder or hub repository.")
  flags.DEFINE_multi_string(
    "setting", [], "name=value, of flextok_jax.load_ar, for the released format.", flag_values=values
  )
  flags.DEFINE_list("classes", [], "Classes by number, or 'all'.", flag_values=values)
  string("prompts_file", None, "File with a text a line.")
  real("guidance_scale", None, "Of the condition; 1 is no guidance; default: the checkpoint's.")
  real("temperature", None, "Default: the checkpoint's.", 0.0)
  integer("top_k", None, "The k likeliest alone are drawn; 0: off; default: the checkpoint's.", 0)
  real("top_p", None, "As many of the likeliest as make up this share; 0: off; default: the checkpoint's.", 0.0, 1.0)
  flags.DEFINE_bool("greedy", False, "The likeliest always.", flag_values=values)
  integer("decoder_steps", None, "Euler steps of the tokenizer's decoder; default: the tokenizer's.", 1)
  flags.DEFINE_enum("decoder_guidance", None, guidance.MODES, "Default: the tokenizer's.", flag_values=values)
  real("decoder_scale", None, "Of the decoder's guidance; 1 is no guidance; default: the tokenizer's.")


@dataclasses.dataclass(frozen=True)
class Sample:
  """What one sample was asked to be; `image` names the picture whose first `kept` tokens it has."""

  condition: int | str | None
  image: str | None
  kept: int
  number: int  # among those of the same condition and image

  @property
  def name(self) -> str:
    """For a file's name."""
    parts = [Path(self.image).stem] if self.image else []
    if isinstance(self.condition, int):
      parts.append(f"class_{self.condition}")
    elif self.condition:
      parts.append(re.sub(r"\W+", "_", self.condition.lower())[:_NAME_LENGTH].strip("_") or "prompt")
    return "_".join(parts) or "unconditional"

  def label(self, num_samples: int, length: int) -> str:
    """For the grid, with its number where there are several, and its length unless it is 0."""
    named = f"class {self.condition}" if isinstance(self.condition, int) else self.condition
    more = [f"#{self.number + 1}"] * (num_samples > 1) + [f"{self.kept} kept"] * (self.kept > 0)
    more += [f"{length} token{'s' * (length > 1)}"] * (length > 0)
    return "\n".join(filter(None, (named or self.image or "unconditional", ", ".join(more))))


def main(values: flags.FlagValues):
  """Draws samples and writes what the module's docstring lists under values.out."""
  prompts = _check_flags(values)
  gen = generation.load_ar(values.checkpoint, **cli.parse_settings(values.setting))
  conditions = read_conditions(values.classes, prompts, gen, values.checkpoint)
  num_tokens, counts = _lengths(values, gen.num_tokens)
  choices = read_choices(values, gen, conditions != [None])
  config, params = load_tokenizer(values, gen)
  predict_fns, registers = make_stage(config).predict_fns, config.tokens.num_registers
  decode = reconstruction.decoder_by_image(predict_fns["detokenize"], values.seed)  # checks the seed
  originals, names, prefix, kept = None, [None], None, values.prefix_tokens or 0
  if kept:
    originals, names = transforms.load_images(values.prefix_images, config.image_size)
    function = functools.partial(predict_fns["tokenize"], num_tokens=nested.slots(kept - 1, registers))
    prefix = tokenize.tokenize(function, params, originals, values.batch_size)[:, :kept]
    prefix, originals = (np.repeat(x, len(conditions) * values.num_samples, axis=0) for x in (prefix, originals))
  samples = [
    Sample(condition, name, kept, number)
    for name in names
    for condition in conditions
    for number in range(values.num_samples)
  ]
  sequences, log_probs = draw(
    gen, [s.condition for s in samples], prefix, values.seed, values.batch_size, num_tokens=num_tokens, **choices
  )

  out, size = Path(values.out), config.image_size
  paths = [out / f"{i:05d}_{sample.name}.png" for i, sample in enumerate(samples)]
  whole = [(i, len(sequence)) for i, sequence in enumerate(sequences)]
  shown = _shown(values.grid_rows, values.num_samples, len(samples))
  columns = [[(i, min(count, len(sequences[i]))) for i in shown] for count in counts]
  growing = [(0, count) for count in range(1, min(values.strip_tokens, len(sequences[0])) + 1)]
  pictures = dict.fromkeys((*growing, *(job for column in columns for job in column)))  # to be kept
  everything = np.zeros((len(samples), size, size, 3), np.uint8) if values.npz else None
  jobs = list(dict.fromkeys((*whole, *pictures)))  # each once
  decoded = decode_prefixes(decode, params, sequences, jobs, registers, values.batch_size)
  for done, (job, picture) in enumerate(decoded, 1):
    if job in pictures:
      pictures[job] = picture
    if job == whole[job[0]]:
      files.write_file(paths[job[0]], plots.to_png(picture))
      if values.npz:
        everything[job[0]] = picture
    _tell("pictures decoded", done, len(jobs), values.batch_size)

  settings = {name: values[name].value for name in ("checkpoint", "tokenizer", "seed")}
  settings |= {"num_tokens": num_tokens, **choices, "decoder": config.sampler.to_dict()}
  outputs = _lists(samples, paths, sequences, log_probs, size, settings)
  if shown:
    labels = [samples[i].label(values.num_samples, len(sequences[i]) if gen.config.ar.stop else 0) for i in shown]
    left = [labels] if originals is None else [labels, originals[shown]]
    ended = {
      (row, len(left) + column)
      for column, count in enumerate(counts)
      for row, i in enumerate(shown)
      if len(sequences[i]) < count
    }
    cells = [np.stack([pictures[job] for job in column]) for column in columns]
    grid = plots.grid([*left, *cells], ["", "original"][: len(left)] + _headers(counts), ended)
    outputs["grid.png"] = plots.to_png(grid)
  if growing:
    cells = np.stack([pictures[job] for job in growing])
    outputs["strip.png"] = plots.to_png(plots.strip(cells, _headers([count for _, count in growing])))
  for name, content in outputs.items():
    files.write_file(out / name, content)
  if values.npz:
    np.savez(out / ".samples.npz", arr_0=everything)  # straight to a file: it may be too large to be held twice
    (out / ".samples.npz").replace(out / "samples.npz")
  some = " ... ".join(path.name for path in paths[:1] + paths[1:][-1:])
  print(f"wrote to {out}: {some}, {', '.join(outputs)}{', samples.npz' * values.npz}")


def draw(
  gen: generation.ARGenerator,
  conditions: Sequence[int | str | None],
  prefix: np.ndarray | None,
  seed: int,
  batch_size: int,
  **choices,
) -> tuple[list[np.ndarray], np.ndarray]:
  """Draws a sequence a condition (all classes, prompts or None), sample i by fold_in(key(seed), i).

  Args:
    prefix: int32 [n, k] or None.
    **choices: of gen.generate.

  Returns:
    (n sequences int32, cut where they end; log-probabilities float32 [n], sums over what was drawn).

  Raises:
    ValueError: a choice out of range, or log-probabilities that are not finite.
  """
  count = len(conditions)
  batch_size = min(batch_size, count)
  sequences, sums = [], []
  for start in range(0, count, batch_size):
    rows = np.minimum(np.arange(start, start + batch_size), count - 1)
    given = [conditions[i] for i in rows]
    condition = {} if given[0] is None else {"prompts" if isinstance(given[0], str) else "labels": given}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)
    ids, log_probs = gen.generate(
      keys, **condition, prefix=None if prefix is None else prefix[rows], return_log_probs=True, **choices
    )
    sequences += gen.trim(ids)[: count - start]
    sums.append(np.asarray(log_probs)[: count - start].sum(1))
    _tell("samples drawn", len(sequences), count, batch_size)
  sums = np.concatenate(sums)
  if not np.isfinite(sums).all():
    raise ValueError("the generator's log-probabilities are not finite: these weights diverged")
  return sequences, sums


def decode_prefixes(
  decode: Callable,
  params: Any,
  sequences: Sequence[np.ndarray],
  jobs: Sequence[tuple[int, int]],
  num_registers: int,
  batch_size: int,
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
  """Yields (job, image uint8 [h, w, 3]) in any order; job (i, k) is sequence i cut to k tokens, with the noise of i.

  Jobs that run on equally many registers run together: each size is compiled once. decode is as of decoder_by_image.
  """
  groups = {}
  for job in jobs:
    groups.setdefault(nested.slots(job[1], num_registers), []).append(job)
  for group in groups.values():
    owners = jnp.asarray([i for i, _ in group])
    own_noise = lambda params, ids, keep_k, index, owners=owners: decode(params, ids, keep_k, owners[index])
    cut = [sequences[i][:k] for i, k in group]
    yield from zip(group, detokenize.detokenize(own_noise, params, cut, num_registers, batch_size))


def _lists(
  samples: list[Sample], paths: list[Path], sequences: list, log_probs: np.ndarray, image_size: int, settings: dict
) -> dict[str, bytes]:
  """Returns tokens.json and samples.json."""
  tokens = {
    "image_size": image_size,
    "num_tokens": settings["num_tokens"],
    "names": [s.name for s in samples],
    "token_ids": [sequence.tolist() for sequence in sequences],
  }
  entries = [
    {
      "file": path.name,
      "condition": sample.condition,
      "prefix_image": sample.image,
      "prefix_tokens": sample.kept,
      "length": len(sequence),
      "log_prob": float(log_prob),
    }
    for sample, path, sequence, log_prob in zip(samples, paths, sequences, log_probs)
  ]
  return {
    "tokens.json": (json.dumps(tokens) + "\n").encode(),
    "samples.json": (json.dumps({"settings": settings, "samples": entries}, indent=1) + "\n").encode(),
  }


def _tell(what: str, done: int, total: int, batch_size: int):
  """Prints a line after the last of the total, and before it after some of the batches."""
  if done == total or done % (batch_size * max(1, total // batch_size // 10)) == 0:
    print(f"{what}: {done} of {total}", flush=True)


def _headers(counts: Sequence[int]) -> list[str]:
  return [plots.column_label(str(count), last=count == counts[-1]) for count in counts]


def _shown(rows: int, num_samples: int, total: int) -> list[int]:
  """Returns the samples in the grid: of each condition its first ones."""
  each = min(num_samples, max(1, rows * num_samples // total))
  return [i for i in range(total) if i % num_samples < each][:rows]


def _check_flags(values: flags.FlagValues) -> list[str]:
  """Checks what can be told without a checkpoint, and returns the prompts."""
  for name in ("checkpoint", "tokenizer", "out"):
    if not values[name].value:
      raise ValueError(f"--{name} is missing")
  if Path(values.out).exists() and not Path(values.out).is_dir():
    raise ValueError(f"--out={values.out} is a file: give a folder")
  given = [f"--{name}" for name in ("classes", "prompts", "prompts_file") if values[name].present]
  if len(given) > 1:
    raise ValueError(f"{' and '.join(given)} are both given: give one of them")
  if given == ["--classes"] and not values.classes:
    raise ValueError("--classes is empty: leave it out to draw without condition")
  if bool(values.prefix_images) != (values.prefix_tokens is not None):
    missing = "prefix_tokens" if values.prefix_images else "prefix_images"
    raise ValueError(f"--{missing} is missing: --prefix_images and --prefix_tokens are given together")
  prompts = []
  if values.prompts is not None:
    prompts = [prompt.strip() for prompt in values.prompts.split(";")]
  elif values.prompts_file is not None:
    return read_prompts(values.prompts_file)
  if "" in prompts:
    raise ValueError(f"prompt {prompts.index('') + 1} of --prompts is empty: leave it out")
  return prompts


def read_prompts(path: str) -> list[str]:
  """Returns the texts of a file, one a line.

  Raises:
    ValueError: not UTF-8, or an empty line between them.
  """
  try:
    prompts = [line.strip() for line in Path(path).read_text("utf-8").rstrip().splitlines()] or [""]
  except UnicodeDecodeError:
    raise ValueError(f"--prompts_file={path} is not a text in UTF-8") from None
  if "" in prompts:
    raise ValueError(f"prompt {prompts.index('') + 1} of --prompts_file is empty: leave it out")
  return prompts


def read_conditions(
  classes: Sequence[str], prompts: Sequence[str], gen: generation.ARGenerator, named: str
) -> list[int | str | None]:
  """Returns classes, prompts, or [None].

  Args:
    classes: numbers, or ["all"].
    named: the generator, in messages.

  Raises:
    ValueError: what this generator does not take.
  """
  kind = gen.config.ar.condition
  if (prompts and kind != "text") or (classes and kind != "class"):
    takes = {"class": "--classes", "text": "--prompts or --prompts_file"}.get(kind, "neither classes nor prompts")
    raise ValueError(f"{named} is a model of condition {kind!r}: it takes {takes}")
  if classes == ["all"]:
    return list(range(gen.num_classes))
  for item in classes:
    if not item.isdecimal() or int(item) >= gen.num_classes:
      raise ValueError(f"class {item} is out of range: classes are 0 to {gen.num_classes - 1}, or 'all'")
  return [int(item) for item in classes] or list(prompts) or [None]


def _lengths(values: flags.FlagValues, most: int) -> tuple[int, tuple[int, ...]]:
  """Returns the number of tokens to draw and the token counts of the grid; `most` is what the model has."""
  num_tokens = most if values.num_tokens is None else values.num_tokens
  if num_tokens > most:
    raise ValueError(f"--num_tokens={num_tokens} is out of range: this model has 1 to {most} tokens")
  if values.prefix_tokens is not None and values.prefix_tokens >= num_tokens:
    raise ValueError(f"--prefix_tokens={values.prefix_tokens} leaves nothing to draw of {num_tokens} tokens")
  for item in values.counts:
    if not item.isdecimal() or not 1 <= int(item) <= num_tokens:
      raise ValueError(f"{item} in --counts is out of range: these are whole numbers from 1 to {num_tokens}")
  return num_tokens, reconstruction.token_counts([int(item) for item in values.counts], num_tokens)


def read_choices(values: flags.FlagValues, gen: generation.ARGenerator, conditioned: bool) -> dict[str, Any]:
  """Returns the arguments of gen.generate that say how tokens are chosen, the checkpoint's where no flag does."""
  ways = ("temperature", "top_k", "top_p")
  for name in ways:
    if values.greedy and values[name].value is not None:
      raise ValueError(f"--{name} has no effect with --greedy: give one of them")
  if values.guidance_scale not in (None, 1) and not conditioned:
    raise ValueError(f"--guidance_scale={values.guidance_scale} has no effect without --classes or --prompts")
  given = {name: values[name].value for name in ("guidance_scale", *ways)}
  choices = {name: gen.config.ar[name] if value is None else value for name, value in given.items()}
  return choices | {"greedy": values.greedy} | ({} if conditioned else {"guidance_scale": 1.0})


def check_tokenizer(config: ConfigDict, params: Any, gen: generation.ARGenerator, named: str):
  """Raises ValueError, in which it is `named`, unless a model is the tokenizer whose ids a generator draws."""
  if config.stage != "tokenizer":
    raise ValueError(f"{named} is a model of stage {config.stage!r}, which has no tokens")
  codes, registers = fsq.num_codes(config.tokens.levels), config.tokens.num_registers
  remedy = "give the tokenizer whose ids it was trained on"
  if gen.num_ids != codes or gen.num_tokens > registers:
    raise ValueError(
      f"the generator draws up to {gen.num_tokens} tokens of {gen.num_ids} ids, {named} takes"
      f" {registers} of {codes}: {remedy}"
    )
  trained = gen.config.ar.tokenizer
  if trained and trained != (given := fingerprint.fingerprint(config, params)):
    raise ValueError(f"the generator was trained on ids of the tokenizer {trained}, but {named} is {given}: {remedy}")


def load_tokenizer(values: flags.FlagValues, gen: generation.ARGenerator) -> tuple:
  """Returns (config, params), the config with the decoder's settings from the flags; checks that the ids are its."""
  config, params = loading.load(values.tokenizer)
  check_tokenizer(config, params, gen, f"--tokenizer={values.tokenizer}")
  scale = values.decoder_scale
  if scale is not None and not np.isfinite(scale):
    raise ValueError(f"--decoder_scale={scale} must be finite")
  if scale is not None and (values.decoder_guidance or config.sampler.guidance) == "none":
    raise ValueError("--decoder_scale has no effect without guidance: give --decoder_guidance=apg or cfg as well")
  return detokenize.with_sampler(config, values.decoder_steps, values.decoder_guidance, scale), params


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
