"""Configuration files of official generators.

The authors' config.yaml describes a model as nested constructor calls (hydra's convention, read in
official_ar_modules.py); a file of flat settings does as well. Nothing in a file is imported or called.
"""

from collections.abc import Callable, Mapping
import math
import re
from typing import Any

import yaml

from flextok_jax.core.literals import MAX_TEXT, MAX_VALUES, parse_json, plain, quote
from flextok_jax.weights.official import generator_modules as official_ar_modules
from flextok_jax.weights.official.generator_facts import Facts, add_settings


def add_file(facts: Facts, path: str):
  """Adds what a configuration file says: the authors' nested calls, or flat settings; YAML or JSON by its name.

  Raises:
    ValueError: it cannot be read, names what is not supported, or contradicts what was said before.
  """
  try:
    with open(path, encoding="utf-8") as f:
      text = f.read(MAX_TEXT + 1)
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f"{path} cannot be read: {e}") from None
  config = parse_json(text, path) if path.endswith(".json") else _parse_yaml(text, path)
  try:
    if "model" in config:
      official_ar_modules.add_calls(facts, config, lambda entry: resolve(config, entry))
    else:
      add_settings(facts, config, "the configuration")
  except ValueError as e:
    raise ValueError(f"{path}: {e} (the weights file alone, with settings, is read without it)") from None


def _parse_yaml(text: str, path: str) -> dict[str, Any]:
  if len(text) > MAX_TEXT:
    raise ValueError(f"{path}: more than {MAX_TEXT} characters of YAML")
  try:
    config = plain(yaml.safe_load(text), "")
  except (yaml.YAMLError, RecursionError, ValueError) as e:
    raise ValueError(f"{path}: no plain YAML ({' '.join(str(e).split())[:160]})") from None
  if type(config) is not dict:
    raise ValueError(f"{path}: a YAML mapping expected, got {quote(config)}")
  return config


# OmegaConf's interpolations: "${a.b}" is the entry a.b of the file, "${mul:3,4}" a product; the authors' framework
# defines these functions.
_INTERPOLATION = re.compile(r"\$\{([^${}]*)\}")
_FUNCTIONS: dict[str, Callable[..., float]] = {
  "add": lambda *x: sum(x),
  "subtract": lambda a, *x: a - sum(x),
  "mul": lambda *x: math.prod(x),
  "mul_int": lambda *x: int(math.prod(x)),
  "div_int": lambda a, *x: int(a / math.prod(x)),
  "div_float": lambda a, *x: a / math.prod(x),
}
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1, and so PyYAML, takes 1e-5 for text


def resolve(config: Mapping[str, Any], entry: Any) -> Any:
  """Returns an entry of a configuration with its interpolations resolved; one that is not understood stays as it is.

  Raises:
    ValueError: interpolations in a circle, or that grow without bound.
  """
  budget = iter(range(MAX_VALUES))

  def walk(value: Any) -> Any:
    if next(budget, None) is None:
      raise ValueError(f"interpolations make more than {MAX_VALUES} values")
    if type(value) is dict:
      return {k: walk(v) for k, v in value.items()}
    if type(value) is list:
      return [walk(v) for v in value]
    if type(value) is not str:
      return value
    found = _INTERPOLATION.search(value)  # an innermost one
    if not found:
      return float(value) if _FLOAT.fullmatch(value) else value
    try:
      inner = _evaluate(config, found[1])
      inner = inner if found[0] == value else f"{value[: found.start()]}{inner}{value[found.end() :]}"
    except (LookupError, TypeError, ValueError, ArithmeticError):
      return value
    return walk(inner)

  try:
    return walk(entry)
  except RecursionError:
    raise ValueError("interpolations in a circle") from None


def _evaluate(config: Mapping[str, Any], expression: str) -> Any:
  name, colon, arguments = expression.partition(":")
  if colon:
    return _FUNCTIONS[name](*(float(x) if "." in x else int(x) for x in arguments.split(",")))
  value: Any = config
  for part in name.split("."):
    value = value[part]
  return value
