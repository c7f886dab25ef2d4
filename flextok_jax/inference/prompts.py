"""Conditions and choices of sampling: what the commands that draw from a generator share."""

from collections.abc import Sequence
import re
from typing import Any

import jax
import numpy as np

from flextok_jax.core import files
from flextok_jax.inference.generator import ARGenerator
from flextok_jax.inference.tokenizer import FlexTok, load_tokenizer, with_positions

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


def condition_text(condition: Condition, class_names: Sequence[str]) -> str:
  """Returns a condition in words; "" for none."""
  if isinstance(condition, int):
    return f"class {condition}" + (f": {class_names[condition]}" if condition < len(class_names) else "")
  return condition or ""


def condition_name(condition: Condition) -> str:
  """Returns a condition's part of a file name; "" for none."""
  if condition is None:
    return ""
  return re.sub(r"\W+", "_", condition_text(condition, ()).lower())[:_NAME_LENGTH].strip("_") or "prompt"


def check_prompts(name: str, prompts: Sequence[str]) -> None:
  """Raises ValueError, naming the argument `name`, if a prompt is empty."""
  if "" in prompts:
    raise ValueError(f"prompt {prompts.index('') + 1} of {name} is empty: leave it out")


def read_conditions(
  classes: Sequence[str], prompts: Sequence[str], gen: ARGenerator, generator: str
) -> list[Condition]:
  """Returns classes, prompts, or [None].

  Args:
    classes: numbers as text, names, or ["all"].
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
  numbers = [gen.class_names.index(item) if item in gen.class_names else item for item in classes]
  for item in numbers:
    if isinstance(item, str) and (not item.isdecimal() or int(item) >= gen.num_classes):
      named = f", their names ({', '.join(gen.class_names)[:120]})" if gen.class_names else ""
      raise ValueError(f"class {item} is out of range: classes are 0 to {gen.num_classes - 1}{named}, or 'all'")
  return [int(item) for item in numbers] or list(prompts) or [None]


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


def load_matching_tokenizer(
  tokenizer: str, gen: ARGenerator, *, posemb_scaling: str | None = None, **options: Any
) -> FlexTok:
  """Loads the tokenizer of a generator, to decode its ids.

  Args:
    tokenizer: path or repository.
    gen: the generator.
    posemb_scaling: of the decoder, in place of its own. The encoder keeps its own, as it identifies the ids.
    **options: num_steps, guidance, guidance_scale and vae_tile of load_tokenizer, in place of its own.

  Raises:
    FileNotFoundError, ValueError: see load_tokenizer; or not the tokenizer whose ids the generator draws.
  """
  model = load_tokenizer(tokenizer, **options)
  gen.check_tokenizer(model, f"tokenizer={tokenizer}")
  return with_positions(model, posemb_scaling, ("decoder",))


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
  name = "prompts" if isinstance(conditions[0], str) else "labels"
  condition: dict[str, Any] = {} if conditions[0] is None else {name: list(conditions)}
  ids, log_probs = gen.generate(
    jax.random.key(seed),
    **condition,
    **choices,
    prefix=prefix,
    num_samples=len(conditions),
    return_log_probs=True,
    batch_size=batch_size,
    progress=progress,
  )
  sums = np.asarray(log_probs).sum(1)
  if not np.isfinite(sums).all():
    raise ValueError("the generator's log-probabilities are not finite: these weights diverged")
  return gen.trim(ids), sums
