"""Parses plain data in untrusted text: nothing is imported, called or evaluated, and sizes are bounded."""

import ast
from collections.abc import Mapping
import itertools
import json
import re
from typing import Any

import yaml

from flextok_jax.core.errors import quote

MAX_TEXT = 1_000_000  # characters per text
MAX_YAML = 100_000  # characters; a second of parsing
MAX_DEPTH = 32  # levels of nesting
MAX_VALUES = 20_000  # per configuration: about thirty times as many as a tokenizer's has
MAX_INT = 2**63

NAME = re.compile(r"[\w-]{1,100}")
BARE_TARGET = re.compile(r"[A-Za-z_][\w.]{0,200}")
# A token in the repr() of plain data. A value must be followed by a bracket, comma, colon or the end. This excludes
# operators, calls and attributes, whose syntax trees can be deep without brackets.
TOKEN = re.compile(
  r"""\s*+(?:(?P<open>[\[({])|(?P<close>[\])}])|[,:]|(?:None|True|False
  |[-+]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?+\d++)?+
  |'[^'\\\n]*+(?:\\(?:[\\'"abfnrtv]|x\w{2}|u\w{4}|U\w{8})[^'\\\n]*+)*+'
  |"[^"\\\n]*+(?:\\(?:[\\'"abfnrtv]|x\w{2}|u\w{4}|U\w{8})[^"\\\n]*+)*+"
  )(?=\s*+(?:[,:\])}]|\Z)))""",
  re.VERBOSE,
)


def join(path: str, name: str) -> str:
  """Returns the dotted path of an entry; a name with other characters than those of words is quoted."""
  name = name if NAME.fullmatch(name) else f"[{quote(name)}]"
  return f"{path}.{name}" if path else name


def plain(value: Any, path: str) -> Any:
  """Returns nested plain data with tuples as lists and mappings as dicts.

  Args:
    value: dicts with text as keys, lists, tuples, text, numbers, booleans and None.
    path: of the value, for errors; "" for a whole configuration.

  Raises:
    ValueError: another type, deeper than MAX_DEPTH, more than MAX_VALUES values, or a huge whole number.
  """
  count = 0

  def walk(value: Any, path: str, depth: int) -> Any:
    nonlocal count
    count += 1
    where = path[:200] or "the configuration"
    if depth > MAX_DEPTH:
      raise ValueError(f"{where[:80]}: nested deeper than {MAX_DEPTH} levels")
    if count > MAX_VALUES:
      raise ValueError(f"{where[:80]}: more than {MAX_VALUES} values in one configuration")
    if value is None or type(value) in (str, bool, float):
      return value
    if type(value) is int:
      if abs(value) >= MAX_INT:
        raise ValueError(f"{where}: a whole number of {value.bit_length()} bits is too large")
      return value
    if isinstance(value, list | tuple):
      return [walk(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
      for key in value:
        if type(key) is not str:
          raise ValueError(f"{where}: a key must be text, got one of type {type(key).__name__}")
      return {key: walk(item, join(path, key), depth + 1) for key, item in value.items()}
    raise ValueError(f"{where} must be plain data (text, numbers, lists, dictionaries), got a {type(value).__name__}")

  return walk(value, path, 0)


def _check_literal(text: str):
  """Raises ValueError unless text consists of the tokens of plain data, in bounded number and depth."""
  position = depth = count = 0
  end = len(text.rstrip())
  while position < end:
    token = TOKEN.match(text, position)
    depth += bool(token and token["open"]) - bool(token and token["close"])
    count += 1
    if not token or depth > MAX_DEPTH or count > 4 * MAX_VALUES:
      raise ValueError("not a plain literal")
    position = token.end()


def _refuse_constant(name: str):
  raise ValueError(f"{name} is not JSON")


def _load_json(text: str) -> Any:
  return json.loads(text, parse_constant=_refuse_constant)


def _parse_value(name: str, text: str) -> Any:
  """Parses one metadata entry: a Python literal, else JSON."""
  if type(text) is not str:
    raise ValueError(f"metadata entry {quote(name)} must be text, got type {type(text).__name__}")
  if len(text) > MAX_TEXT:
    raise ValueError(f"metadata entry {quote(name)} has {len(text)} characters: at most {MAX_TEXT} are read")
  if name == "_target_" and BARE_TARGET.fullmatch(text):
    return text
  try:
    _check_literal(text)
    return ast.literal_eval(text.strip())
  except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
    pass  # not a Python literal: try JSON
  try:
    return _load_json(text)
  except (ValueError, RecursionError, MemoryError):
    raise ValueError(f"metadata entry {quote(name)} is neither a Python literal nor JSON: {quote(text)}") from None


def parse_literals(metadata: Mapping[str, str]) -> dict[str, Any]:
  """Parses the __metadata__ of a safetensors header, where official files have their configuration.

  Args:
    metadata: {entry: text}, each the str() of a Python literal (or JSON); "_target_" is a bare dotted name. The entry
      "format", which other software adds, is left out.

  Returns:
    {entry: plain data}: dicts with text keys, lists, text, numbers, booleans, None.

  Raises:
    ValueError: not a literal, too large, or nested too deep; one line that names the entry.
  """
  if not isinstance(metadata, Mapping):
    raise ValueError(f"metadata must be a dictionary, got type {type(metadata).__name__}")
  values = {name: _parse_value(name, text) for name, text in metadata.items() if name != "format"}
  return plain(values, "metadata")


def parse_json(text: str | bytes, origin: str) -> dict[str, Any]:
  """Parses a JSON object.

  Args:
    text: JSON, as text or as UTF-8 bytes.
    origin: of the text, for errors; for example a file's path.

  Raises:
    ValueError: not a JSON object, NaN or infinity, too large, or nested too deep; one line that names the origin.
  """
  if not isinstance(text, str | bytes):
    raise ValueError(f"{origin}: JSON must be text, got type {type(text).__name__}")
  if len(text) > MAX_TEXT:
    raise ValueError(f"{origin}: {len(text)} characters of JSON: at most {MAX_TEXT} are read")
  try:
    text = text if isinstance(text, str) else text.decode()
    value = _load_json(text.removeprefix("\ufeff"))  # a byte order mark
  except RecursionError:
    raise ValueError(f"{origin}: nested deeper than {MAX_DEPTH} levels") from None
  except (ValueError, MemoryError) as e:
    raise ValueError(f"{origin}: not JSON ({str(e).splitlines()[0][:100]}): {quote(text[:80])}") from None
  if not isinstance(value, dict):
    raise ValueError(f"{origin}: a JSON object expected, got {quote(value)}")
  try:
    return plain(value, "")
  except ValueError as e:
    raise ValueError(f"{origin}: {e}") from None


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
  """Parses a YAML mapping of plain data. An alias counts as much as what it repeats.

  Args:
    text: YAML.
    origin: of the text, for errors; for example a file's path.

  Raises:
    ValueError: not a YAML mapping of plain data, too large, or nested too deep; one line that names the origin.
  """
  if len(text) > MAX_YAML:
    raise ValueError(f"{origin}: more than {MAX_YAML} characters of YAML")
  try:
    node = yaml.compose(text, yaml.SafeLoader)
    _check_size(node, {})
    document = plain(yaml.constructor.SafeConstructor().construct_document(node) if node else None, "")
  except (yaml.YAMLError, ValueError, RecursionError) as e:
    raise ValueError(f"{origin}: not plain YAML ({' '.join(str(e).split())[:160]})") from None
  except Exception as e:  # of the constructors: "!!bool x" is a KeyError, "!!timestamp x" an AttributeError
    raise ValueError(f"{origin}: not plain YAML (a value does not suit its tag: {quote(e)})") from None
  if not isinstance(document, dict):
    raise ValueError(f"{origin}: expected a YAML mapping, got {quote(document)}")
  return document


def _check_size(node: yaml.Node | None, sizes: dict[int, int]) -> int:
  """Returns the number of values in a tree of YAML nodes, in which aliases are the same node; sizes: those known."""
  if id(node) not in sizes:
    sizes[id(node)] = MAX_VALUES + 1  # inside itself it has no end
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    children = itertools.chain(*parts) if isinstance(node, yaml.MappingNode) else parts
    sizes[id(node)] = 1 + sum(_check_size(child, sizes) for child in children)
  if sizes[id(node)] > MAX_VALUES:
    raise ValueError(f"more than {MAX_VALUES} values in one configuration, aliases counted as what they repeat")
  return sizes[id(node)]
