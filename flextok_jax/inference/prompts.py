"""Conditions and choices of sampling: what the commands that draw from a generator share."""

from collections.abc import Sequence
import re
from typing import Any

import jax
import numpy as np

from flextok_jax.core import files
from flextok_jax.core.progress import track
from flextok_jax.inference.generator import ARGenerator
from flextok_jax.inference.tokenizer import FlexTok, load_tokenizer
from flextok_jax.parallel import batching
from flextok_jax.weights import fingerprints

Condition = int | str | None  # a class, a prompt, or unconditional
_NAME_LENGTH = 40  # characters of a prompt in a file's name


def read_prompts(path: str) -> list[str]:
  """Reads a text file with one prompt per line.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not UTF-8, or an empty line between prompts.
  """
  text = files.read_text(path, name=f"prompts_file={files.printable(path)}")
  prompts = [line.strip() for line in files.lines(text.rstrip())]
  check_prompts("prompts_file", prompts)
  return prompts


def read_texts(listed: str | None, path: str | None) -> list[str]:
  """Returns the prompts of the flags --prompts, separated by semicolons, or --prompts_file; [] if neither is given.

  Raises:
    FileNotFoundError, ValueError: see read_prompts; or a prompt is empty.
  """
  if path is not None:
    return read_prompts(path)
  if listed is None:
    return []
  texts = [prompt.strip() for prompt in listed.split(";")]
  check_prompts("--prompts", texts)
  return texts


def condition_name(condition: Condition) -> str:
  """Returns a condition's part of a file name; "" for none."""
  if isinstance(condition, int):
    return f"class_{condition}"
  if not condition:
    return ""
  return re.sub(r"\W+", "_", condition.lower())[:_NAME_LENGTH].strip("_") or "prompt"


def check_prompts(name: str, prompts: Sequence[str]) -> None:
  """Raises ValueError, naming the argument `name`, if a prompt is empty."""
  if "" in prompts:
    raise ValueError(f"prompt {prompts.index('') + 1} of {name} is empty: leave it out")


def read_conditions(
  classes: Sequence[str], prompts: Sequence[str], gen: ARGenerator, generator: str
) -> list[Condition]:
  """Returns classes, prompts, or [None].

  Args:
    classes: numbers as text, or ["all"].
    prompts: texts.
    gen: the generator.
    generator: its name, for messages.

  Raises:
    ValueError: this generator does not take such conditions.
  """
  kind = gen.config.ar.condition
  if (prompts and kind != "text") or (classes and kind != "class"):
    takes = {"class": "classes", "text": "prompts"}.get(kind, "neither classes nor prompts")
    raise ValueError(f"{generator} is a model of condition {kind!r}: it takes {takes}")
  if classes == ["all"]:
    return list(range(gen.num_classes))
  for item in classes:
    if not item.isdecimal() or int(item) >= gen.num_classes:
      raise ValueError(f"class {item} is out of range: classes are 0 to {gen.num_classes - 1}, or 'all'")
  return [int(item) for item in classes] or list(prompts) or [None]


def sampling_choices(
  gen: ARGenerator,
  conditioned: bool,
  *,
  greedy: bool = False,
  guidance_scale: float | None = None,
  temperature: float | None = None,
  top_k: int | None = None,
  top_p: float | None = None,
) -> dict[str, Any]:
  """Returns the arguments of gen.generate that say how tokens are chosen; None means the checkpoint's own.

  Args:
    conditioned: whether the samples have a class or a prompt; without, there is no guidance.

  Raises:
    ValueError: an argument that has no effect.
  """
  ways = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
  for name, value in ways.items():
    if greedy and value is not None:
      raise ValueError(f"{name}={value} has no effect when greedy: give one of them")
  if guidance_scale not in (None, 1) and not conditioned:
    raise ValueError(f"guidance_scale={guidance_scale} has no effect without classes or prompts")
  given = {"guidance_scale": guidance_scale if conditioned else 1.0, **ways}
  return {name: gen.config.ar[name] if value is None else value for name, value in given.items()} | {"greedy": greedy}


def check_tokenizer(tokenizer: FlexTok, gen: ARGenerator, name: str) -> None:
  """Raises ValueError, calling the model `name`, unless it is the tokenizer whose ids a generator draws."""
  gen.check_sizes(tokenizer, name)
  trained = gen.config.ar.tokenizer
  if trained and trained != (given := fingerprints.tokenizer(tokenizer.config, tokenizer.params)):
    raise ValueError(
      f"the generator was trained on ids of the tokenizer {trained}, but {name} is {given}: "
      "give the tokenizer whose ids it was trained on"
    )


def load_matching_tokenizer(tokenizer: str, gen: ARGenerator, **sampler: Any) -> FlexTok:
  """Loads the tokenizer of a generator.

  Args:
    tokenizer: path or repository.
    **sampler: num_steps, guidance and guidance_scale, in place of its own.

  Raises:
    FileNotFoundError, ValueError: see load_tokenizer; or not the tokenizer whose ids the generator draws.
  """
  model = load_tokenizer(tokenizer, **sampler)
  check_tokenizer(model, gen, f"tokenizer={tokenizer}")
  return model


def padded(sequences: Sequence[np.ndarray], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns sequences as ids int32 [n, num_tokens], 0 past their ends, and their lengths int [n]."""
  ids = np.zeros((len(sequences), num_tokens), np.int32)
  for row, sequence in zip(ids, sequences):
    row[: len(sequence)] = sequence
  return ids, np.array([len(sequence) for sequence in sequences])


def draw(
  gen: ARGenerator,
  conditions: Sequence[Condition],
  prefix: np.ndarray | None,
  seed: int,
  batch_size: int,
  *,
  progress: bool | None = False,
  **choices: Any,
) -> tuple[list[np.ndarray], np.ndarray]:
  """Draws one sequence per condition (all classes, all prompts, or all None), sample i by fold_in(key(seed), i).

  Args:
    prefix: int32 [n, k] or None.
    progress: whether a bar shows the samples drawn; None: a bar on a terminal, and elsewhere lines.
    **choices: of gen.generate.

  Returns:
    (n sequences int32, cut where they end; log-probabilities float32 [n], summed over the drawn tokens).

  Raises:
    ValueError: a choice out of range, or log-probabilities that are not finite.
  """
  count = len(conditions)

  def draw_rows(rows: np.ndarray) -> Any:
    given = [conditions[i] for i in rows]
    condition: dict[str, Any] = (
      {} if given[0] is None else {"prompts" if isinstance(given[0], str) else "labels": given}
    )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)
    kept = None if prefix is None else prefix[rows]
    return gen.generate(keys, **condition, prefix=kept, return_log_probs=True, **choices)

  size = batching.batch_rows(batch_size, count)
  sequences, sums = [], []
  drawn = batching.map_batches(draw_rows, batching.slices(np.arange(count), size), size)
  for ids, log_probs in track(drawn, count, "samples drawn", progress, size=lambda batch: len(batch[0])):
    sequences += gen.trim(ids)
    sums.append(log_probs.sum(1))
  if not np.isfinite(np.concatenate(sums)).all():
    raise ValueError("the generator's log-probabilities are not finite: these weights diverged")
  return sequences, np.concatenate(sums)
