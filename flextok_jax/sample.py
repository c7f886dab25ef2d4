"""Draws images: token ids by a generator, decoded by the tokenizer that it was trained with.

python -m flextok_jax.sample --checkpoint=GENERATOR --tokenizer=PATH --out=DIR
    [--classes=0,3,7 | --classes=all | --prompts="a red star;two blue rings" | --prompts_file=FILE]
    [--prefix_images=FILES_OR_FOLDERS --prefix_tokens=K] [--num_samples=N] [--num_tokens=N]
    [--size=HEIGHT,WIDTH --posemb_scaling=interpolate]

Writes one PNG file per sample; tokens.json, which flextok_jax.detokenize reads (with the same settings it writes the
same images); samples.json with settings, conditions, lengths and log-probabilities; grid.png, one row per sample and
one column per number of tokens, framed if the sample has fewer; strip.png, the first sample token by token; and with
--npz samples.npz, arr_0 uint8 [n, h, w, 3].

Sample i depends on the seed, its condition and i alone: it is that of ARGenerator.generate and FlexTok.detokenize with
jax.random.key(seed).
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
from pathlib import Path

from absl import flags
import jax
import numpy as np

from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.core.progress import track
from flextok_jax.evals import grids
from flextok_jax.inference import batches, decoding, image_files, prompts, token_files, validation
from flextok_jax.inference.generator import load_ar
from flextok_jax.inference.tokenizer import with_positions


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  cli.define_draw_flags(values)
  cli.define_size_flags(values)
  string("checkpoint", None, "A generator: file, folder or hub repository.")
  string("out", None, "Folder for the results.")
  string("prompts", None, "Texts, separated by semicolons.")
  integer("num_samples", 1, "Samples per class, prompt and image.", 1)
  flags.DEFINE_list("prefix_images", [], "Image files and folders whose first tokens are kept.", flag_values=values)
  integer("prefix_tokens", None, "How many tokens of these are kept; the others are drawn.", 1)
  integer("num_tokens", None, "Tokens per sample at most; default: the model's.", 1)
  integer("seed", 0, "Of the tokens and of the decoder's noise.")
  integer("batch_size", 32, "Samples per batch.", 1)
  flags.DEFINE_list("counts", [], "Token counts, the columns of the grid; default: powers of two.", flag_values=values)
  integer("grid_rows", 16, "Samples in the grid at most, the same number of each condition; 0: no grid.", 0)
  integer("strip_tokens", 32, "Pictures in the strip at most; 0: no strip.", 0)
  flags.DEFINE_bool("npz", False, "Also write samples.npz.", flag_values=values)


@dataclasses.dataclass(frozen=True)
class Sample:
  """What one sample is conditioned on; `image` names the image whose first `kept` tokens it has."""

  condition: prompts.Condition
  image: str | None
  kept: int
  number: int  # among those of the same condition and image

  @property
  def name(self) -> str:
    """Its part of a file name."""
    parts = [token_files.file_stem(self.image)] if self.image else []
    parts += filter(None, [prompts.condition_name(self.condition)])
    return files.shorten("_".join(parts)) or "unconditional"

  def label(self, num_samples: int, length: int, class_names: Sequence[str]) -> str:
    """Its label in the grid, with its number if there are several, and its length unless it is 0."""
    named = prompts.condition_text(self.condition, class_names)
    more = [f"#{self.number + 1}"] * (num_samples > 1) + [f"{self.kept} kept"] * (self.kept > 0)
    more += [f"{length} token{'s' * (length > 1)}"] * (length > 0)
    return "\n".join(filter(None, (named or self.image or "unconditional", ", ".join(more))))


def main(values: flags.FlagValues):
  """Draws samples and writes what the module's docstring lists under values.out."""
  texts, size = _check_flags(values), cli.parse_size(values)

  # Models, and everything that can be checked before drawing.
  gen = load_ar(values.checkpoint, **cli.parse_settings(values.setting))
  conditions = prompts.read_conditions(values.classes, texts, gen, values.checkpoint)
  num_tokens, counts = _token_counts(values, gen.num_tokens)
  choices = prompts.sampling_choices(gen, conditions != [None], **cli.choice_flags(values))
  with cli.renamed(**cli.DECODER_FLAGS):
    tokenizer = prompts.load_matching_tokenizer(
      values.tokenizer, gen, posemb_scaling=values.posemb_scaling, vae_tile=values.vae_tile, **cli.decoder_flags(values)
    )
  height, width = size or (tokenizer.image_size,) * 2
  tokenizer.latent_shape_of((height, width))  # raises for a size that it cannot decode

  # Token ids.
  names: list[str | None] = [None]
  originals, prefix, kept = None, None, values.prefix_tokens or 0
  if kept:
    originals, found = image_files.load_crops(values.prefix_images, tokenizer, size)
    names = [files.as_text(name) for name in found]
    encoder = with_positions(tokenizer, values.posemb_scaling)
    prefix = batches.tokenize(encoder, originals, kept, values.batch_size)
    originals, prefix = (np.repeat(x, len(conditions) * values.num_samples, axis=0) for x in (originals, prefix))
  samples = [
    Sample(condition, name, kept, number)
    for name in names
    for condition in conditions
    for number in range(values.num_samples)
  ]
  sequences, log_probs = prompts.draw(
    gen,
    [s.condition for s in samples],
    prefix,
    values.seed,
    values.batch_size,
    progress=None,
    num_tokens=num_tokens,
    **choices,
  )

  # Images: of all samples, and of the prefixes in the grid and the strip. A job is (sample, number of tokens).
  out = cli.out_folder(values)
  files.clear_leftovers(out)
  paths = [out / f"{i:05d}_{sample.name}.png" for i, sample in enumerate(samples)]
  complete = [(i, len(sequence)) for i, sequence in enumerate(sequences)]
  shown = _shown(values.grid_rows, values.num_samples, len(samples))
  columns = [[(i, min(count, len(sequences[i]))) for i in shown] for count in counts]
  growing = [(0, count) for count in range(1, min(values.strip_tokens, len(sequences[0])) + 1)]
  drawn = [*growing, *(job for column in columns for job in column)]
  pictures: dict[batches.Job, np.ndarray] = {}  # those of `drawn`
  everything = np.zeros((len(samples), height, width, 3), np.uint8) if values.npz else None
  jobs = list(dict.fromkeys((*complete, *drawn)))  # each once
  sizes = None if size is None else [size] * len(samples)
  decoded = batches.decode_prefixes(tokenizer, sequences, jobs, jax.random.key(values.seed), values.batch_size, sizes)
  for job, picture in track(decoded, len(jobs), "pictures decoded"):
    if job in drawn:
      pictures[job] = picture
    if job == complete[job[0]]:
      files.write_file(paths[job[0]], grids.to_png(picture))
      if everything is not None:
        everything[job[0]] = picture

  # Lists, grid, strip and archive.
  settings = {name: values[name].value for name in ("checkpoint", "tokenizer", "seed")}
  settings |= {
    "num_tokens": num_tokens,
    **choices,
    "decoder": tokenizer.config.sampler.to_dict(),
    "size": [height, width],
  }
  entries = [(sample.name, sequence) for sample, sequence in zip(samples, sequences)]
  outputs = {
    "tokens.json": token_files.to_json(
      token_files.Facts(tokenizer.fingerprint, tokenizer.image_size, num_tokens), entries, sizes
    ),
    "samples.json": _samples_json(samples, paths, sequences, log_probs, settings),
  }
  if shown:
    lengths = [len(sequences[i]) if gen.config.ar.stop else 0 for i in shown]
    labels = [samples[i].label(values.num_samples, n, gen.class_names) for i, n in zip(shown, lengths)]
    left = [labels] if originals is None else [labels, originals[shown]]
    ended = {
      (row, len(left) + column)
      for column, count in enumerate(counts)
      for row, i in enumerate(shown)
      if len(sequences[i]) < count
    }
    cells = [np.stack([pictures[job] for job in column]) for column in columns]
    grid = grids.grid([*left, *cells], ["", "original"][: len(left)] + _headers(counts), ended)
    outputs["grid.png"] = grids.to_png(grid)
  if growing:
    row = np.stack([pictures[job] for job in growing])
    outputs["strip.png"] = grids.to_png(grids.strip(row, _headers([count for _, count in growing])))
  for name, content in outputs.items():
    files.write_file(out / name, content)
  if everything is not None:
    with files.replacing(out / "samples.npz") as temporary, open(temporary, "wb") as file:
      np.savez(file, arr_0=everything)  # directly to a file: two copies may not fit into memory
  some = " ... ".join(path.name for path in paths[:1] + paths[1:][-1:])
  print(f"wrote to {out}: {some}, {', '.join(outputs)}{', samples.npz' * values.npz}")


def _samples_json(
  samples: list[Sample], paths: list[Path], sequences: list[np.ndarray], log_probs: np.ndarray, settings: dict
) -> bytes:
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
  return (json.dumps({"settings": settings, "samples": entries}, indent=1) + "\n").encode()


def _headers(counts: Sequence[int]) -> list[str]:
  return [grids.column_label(str(count), last=count == counts[-1]) for count in counts]


def _shown(rows: int, num_samples: int, total: int) -> list[int]:
  """Returns the samples in the grid, the first ones of each condition."""
  each = min(num_samples, max(1, rows * num_samples // total))
  return [i for i in range(total) if i % num_samples < each][:rows]


def _check_flags(values: flags.FlagValues) -> list[str]:
  """Checks what can be checked without a checkpoint, and returns the prompts."""
  cli.require(values, "checkpoint", "tokenizer", "out")
  cli.out_folder(values)
  validation.seed(values.seed)
  given = [f"--{name}" for name in ("classes", "prompts", "prompts_file") if values[name].present]
  if len(given) > 1:
    raise ValueError(f"{' and '.join(given)} are both given: give one of them")
  if given == ["--classes"] and not values.classes:
    raise ValueError("--classes is empty: leave it out to draw without condition")
  if bool(values.prefix_images) != (values.prefix_tokens is not None):
    missing = "prefix_tokens" if values.prefix_images else "prefix_images"
    raise ValueError(f"--{missing} is missing: --prefix_images and --prefix_tokens are given together")
  return prompts.read_texts(values.prompts, values.prompts_file)


def _token_counts(values: flags.FlagValues, most: int) -> tuple[int, tuple[int, ...]]:
  """Returns the number of tokens to draw and the token counts of the grid; `most`: tokens per sample at most."""
  num_tokens = most if values.num_tokens is None else values.num_tokens
  if num_tokens > most:
    raise ValueError(f"--num_tokens={num_tokens} is out of range: this model has 1 to {most} tokens")
  if values.prefix_tokens is not None and values.prefix_tokens >= num_tokens:
    raise ValueError(f"--prefix_tokens={values.prefix_tokens} leaves nothing to draw of {num_tokens} tokens")
  for item in values.counts:
    if not item.isdecimal() or not 1 <= int(item) <= num_tokens:
      raise ValueError(f"{item} in --counts is out of range: these are whole numbers from 1 to {num_tokens}")
  return num_tokens, decoding.token_counts([int(item) for item in values.counts], num_tokens)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
