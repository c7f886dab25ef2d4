"""Configuration files of official generators.

The authors' config.yaml describes a model as nested constructor calls (hydra's convention, see generator_modules.py);
a file of flat settings is read too. Nothing in a file is imported or called.
"""

from collections.abc import Callable, Mapping
import math
import re
from typing import Any

from flextok_jax.core import files
from flextok_jax.core.literals import MAX_TEXT, MAX_VALUES, parse_json, parse_yaml
from flextok_jax.weights.official import generator_modules
from flextok_jax.weights.official.generator_settings import Settings


def add_file(settings: Settings, path: str):
  """Adds the settings in a configuration file: the authors' nested calls or flat settings, as YAML or JSON.

  Raises:
    ValueError: it cannot be read, names what is not supported, or contradicts settings that were added before.
  """
  text = files.read_text(path, MAX_TEXT)
  document = (parse_json if path.endswith(".json") else parse_yaml)(text, path)
  try:
    if "model" in document:
      generator_modules.add_calls(settings, document, lambda entry: resolve(document, entry))
    else:
      settings.add_all(document, "the configuration")
  except ValueError as e:
    raise ValueError(f"{path}: {e} (the weights file alone, with settings, loads without it)") from None


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
_MAX_RESOLVED = 10_000  # characters of a text
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1, and so PyYAML, reads 1e-5 as text


def resolve(document: Mapping[str, Any], entry: Any) -> Any:
  """Returns an entry of a document with its interpolations resolved; unknown ones are left as they are.

  Raises:
    ValueError: circular interpolations, or ones that grow without bound.
  """
  budget = iter(range(MAX_VALUES))

  def walk(value: Any) -> Any:
    if next(budget, None) is None:
      raise ValueError(f"interpolations expand to more than {MAX_VALUES} values")
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
      inner = _evaluate(document, found[1])
      inner = inner if found[0] == value else f"{value[: found.start()]}{inner}{value[found.end() :]}"
    except (LookupError, TypeError, ValueError, ArithmeticError):
      return value
    if isinstance(inner, str) and len(inner) > _MAX_RESOLVED:
      raise ValueError(f"interpolations expand to a text of more than {_MAX_RESOLVED} characters")
    return walk(inner)

  try:
    return walk(entry)
  except RecursionError:
    raise ValueError("circular interpolations, or too many in one text") from None


def _evaluate(document: Mapping[str, Any], expression: str) -> Any:
  name, colon, arguments = expression.partition(":")
  if colon:
    return _FUNCTIONS[name](*(float(x) if "." in x else int(x) for x in arguments.split(",")))
  value: Any = document
  for part in name.split("."):
    value = value[part]
  return value
