"""Configs as text, in the order and with the comments of config/defaults.py."""

from collections.abc import Mapping
import functools
import inspect
import re
import textwrap
from typing import Any, NamedTuple

from flextok_jax.config import defaults
from flextok_jax.config.ranges import flat

_WIDTH = 120
_LINE = re.compile(r"(c|part)\.([\w.]+) = (.*?)(?:  # (.*))?")
_PARTS = ("encoder", "decoder")  # the sections that `part` refers to


class _Field(NamedTuple):
  """A field, or a group of fields, with the comments above and beside it."""

  name: str
  above: str
  beside: str


def describe(config: Mapping[str, Any]) -> str:
  """Returns a config as lines "name = value" with the comments of its fields; changed fields name their default."""
  values, usual = flat(config), flat(defaults.get_config())
  lines: list[str] = []
  section = ""
  for field in _fields():
    inside = [name for name in values if f"{name}.".startswith(f"{field.name}.")]
    found = field.name.replace("decoder.", "encoder.").rpartition(".")[0].partition(".")[0]
    if inside and found != section and lines:
      lines.append("")
    section = found if inside else section
    comments = field.above
    for i, name in enumerate(inside):
      notes = [f"default: {usual[name]!r}"] * (usual[name] != values[name]) + [field.beside] * (i == 0)
      line = f"{name} = {values[name]!r}"
      beside = f"{line}  # {'; '.join(filter(None, notes))}" if any(notes) else line
      if len(beside) > _WIDTH:
        comments, beside = f"{comments} {'; '.join(filter(None, notes))}".strip(), line
      lines += textwrap.wrap(comments, _WIDTH, initial_indent="# ", subsequent_indent="# ")
      lines.append(beside)
      comments = ""
  return "\n".join(lines) + "\n"


@functools.cache
def _fields() -> tuple[_Field, ...]:
  """Returns the fields and groups of fields that defaults.py assigns, in its order."""
  found: dict[str, _Field] = {}
  above: list[str] = []
  group = ""  # comments of a section, which go with its first field
  for line in map(str.strip, inspect.getsource(defaults.get_config).splitlines()):
    if line.startswith("#"):
      above.append(line.lstrip("# "))
      continue
    if match := _LINE.fullmatch(line):
      target, name, value, beside = match.groups(default="")
      text = " ".join([group, *above]).strip()
      if value == "ConfigDict()":
        group = " ".join([text, beside]).strip()
      else:
        for path in [f"{part}.{name}" for part in _PARTS] if target == "part" else [name]:
          found[path], text = _Field(path, text, beside), ""
        group = ""
    elif line.startswith("c.") and "= ConfigDict(" in line:  # a group of several lines
      path = line.partition(" = ")[0].removeprefix("c.")
      found[path] = _Field(path, " ".join(above), "")
    above = []
  return tuple(found.values())
