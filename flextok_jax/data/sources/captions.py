"""Captions and labels in the files that people store beside pictures."""

from collections.abc import Iterable, Mapping
import json
import re
from typing import Any

from flextok_jax.core import files
from flextok_jax.core.errors import first_line, warn_once

MAX_BYTES = 1_000_000  # of a caption file
KEYS = ("captions", "caption", "text")  # of the fields of a picture, the preferred one first
_BOX = re.compile(r"\s*[-+.\deE]+(\s+[-+.\deE]+){4,}\s*")  # a line of YOLO: class, then the numbers of a box or outline


def clean(texts: Iterable[str]) -> tuple[str, ...]:
  """Returns the texts that are not blank, each as one line of valid Unicode."""
  valid = (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)
  return tuple(line for line in (" ".join(text.split()) for text in valid) if line)


def in_fields(fields: Mapping[str, Any], key: str = "") -> tuple[str, ...]:
  """Returns the captions in the fields of a picture: a text or a list of texts; () if there is none.

  Args:
    fields: of the picture.
    key: the field; "": the first of KEYS that has a caption.
  """
  for name in (key,) if key else KEYS:
    value = fields.get(name)
    texts = value if isinstance(value, (list, tuple)) else [value]
    if found := clean(text for text in texts if isinstance(text, str)):
      return found
  return ()


def in_file(name: str, data: bytes, source: str, key: str = "") -> tuple[str, ...]:
  """Returns the captions in a file beside a picture: the lines of a .txt, the field of a .json; () if it has none.

  What is no caption is logged: a damaged file or one in another encoding by its name, other contents (empty files,
  boxes of objects, annotations) once per source.

  Args:
    name: of the file.
    data: its bytes, at most MAX_BYTES + 1.
    source: what messages call the source.
    key: see in_fields.
  """
  try:
    text = files.decode_text(data, MAX_BYTES)
    found: tuple[str, ...] = ()
    if not text.strip():
      problem = "are empty"
    elif name.lower().endswith(".json"):
      try:
        fields = json.loads(text)
      except (ValueError, RecursionError) as error:
        raise ValueError(f"is damaged JSON ({first_line(error, 100)})") from None
      found = in_fields(fields, key) if isinstance(fields, dict) else ()
      problem = f"have no {' or '.join(map(repr, (key,) if key else KEYS))} with a text"
    else:
      lines = [line for line in files.lines(text) if line.strip()]
      found = () if all(map(_BOX.fullmatch, lines)) else clean(lines)
      problem = "hold numbers, such as the boxes of objects"
  except ValueError as error:
    warn_once(f"No caption in {files.printable(name)}: it {error}")
    return ()
  if not found:
    warn_once(f"{source}: files like {files.printable(name)} {problem}: no captions", key=f"{source} {problem}")
  return found


def label_number(value: Any) -> int | None:
  """Returns the number of a label, an int or its digits; None for others."""
  text = str(value)
  return int(text) if not isinstance(value, bool) and re.fullmatch(r"[0-9]{1,9}", text) else None
