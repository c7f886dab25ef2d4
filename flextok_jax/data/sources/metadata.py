"""metadata.jsonl and metadata.csv beside pictures, as Hugging Face's imagefolder has them."""

from collections.abc import Iterator
import csv
import io
import json
import os
from typing import Any

from flextok_jax.core import files
from flextok_jax.core.errors import first_line, warn_once
from flextok_jax.data.listing import Found, natural, normal
from flextok_jax.data.sources import captions

MAX_BYTES = 2**30
_FILE_KEYS = ("file_name", "image_file_name", "filename")
_LABEL_KEY = "label"


class Metadata:
  """Captions and labels of the pictures of a folder, from all its metadata files.

  Several rows of a picture add their captions; the first label counts. What cannot be used is counted in a warning.

  Args:
    folder: of the pictures.
    found: what it holds.
    caption_key: field of the caption; "": see captions.KEYS.
    label_key: field of the label; "": "label", if there is one.

  Attributes:
    captions: {picture: captions}.
    labels: {picture: number or name}.
    has_captions: whether a picture has one.
    has_labels: whether there is a field of labels.

  Raises:
    ValueError: a file is damaged as a whole, in another encoding, or lacks a field.
  """

  def __init__(self, folder: str, found: Found, caption_key: str, label_key: str):
    self.captions: dict[str, tuple[str, ...]] = {}
    self.labels: dict[str, Any] = {}
    self.has_labels = False
    if not found.metadata:
      return
    paths = {normal(path): path for path in found.files}
    seen = set()
    for file in found.metadata:
      where = os.path.join(folder, file)
      name, absent, nameless, unlabelled, named = files.printable(where), [], 0, 0, False
      fields: set[str] = set()
      for row in _rows(where, name):
        fields |= row.keys()
        given = next((row[key] for key in _FILE_KEYS if isinstance(row.get(key), str)), None)
        if given is None:
          nameless += 1
          continue
        named = True
        path = paths.get(normal(os.path.normpath(os.path.join(os.path.dirname(file), given.replace("\\", "/")))))
        if path is None:
          absent.append(given)
          continue
        seen.add(path)
        if texts := captions.in_fields(row, caption_key):
          self.captions[path] = self.captions.get(path, ()) + texts
        label = row.get(label_key or _LABEL_KEY)
        if label in (None, "") or isinstance(label, (list, dict)):
          unlabelled += 1
        else:
          self.labels.setdefault(path, label)
      if not named:
        raise ValueError(f"{name} has no field file_name, the path of a picture: its fields are {_listed(fields)}")
      if nameless:
        warn_once(f"{name}: {nameless} rows have no file_name, the path of a picture")
      for key, option in ((caption_key, "caption_key"), (label_key, "label_key")):
        if key and key not in fields:
          raise ValueError(f"{name} has no field {option}={key!r}: its fields are {_listed(fields)}")
      self.has_labels |= (label_key or _LABEL_KEY) in fields
      if absent:
        example = files.printable(absent[0][:200])
        warn_once(f"{name}: {len(absent)} rows name no picture of the folder, such as {example}")
      if unlabelled and self.has_labels:
        warn_once(f"{name}: {unlabelled} rows have no label, or several: their pictures have label -1")
      if not self.has_labels and not self.captions:
        warn_once(
          f"{name} has neither captions nor labels: name their fields by caption_key and label_key, of"
          f" {_listed(fields)}"
        )
    if missing := len(found.files) - len(seen):
      warn_once(f"{missing} pictures of {files.printable(folder)} have no row in {', '.join(found.metadata)[:200]}")

  def class_names(self) -> tuple[str, ...]:
    """Returns the names of the labels in natural order; () if all are numbers."""
    names = {normal(str(label)) for label in self.labels.values()}
    return () if all(captions.label_number(name) is not None for name in names) else tuple(sorted(names, key=natural))


def _rows(path: str, name: str) -> Iterator[dict[str, Any]]:
  text = files.read_text(path, MAX_BYTES)
  parse = _csv_rows if path.endswith(".csv") else _json_rows
  bad, reason, count = 0, "", 0
  for line, row in parse(text):
    if isinstance(row, dict):
      count += 1
      yield row
    else:
      bad += 1
      reason = reason or f"line {line}: {first_line(row, 100)}"
  if not count:
    raise ValueError(f"{name} has no row that can be read ({reason or 'it is empty'})")
  if bad:
    warn_once(f"{name}: {bad} lines cannot be read, the first is {reason}")


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
  for number, line in enumerate(files.lines(text), 1):
    if line.strip():
      try:
        row = json.loads(line)
        yield number, row if isinstance(row, dict) else ValueError('not {"file_name": "...", ...}')
      except (ValueError, RecursionError) as error:
        yield number, error


def _csv_rows(text: str) -> Iterator[tuple[int, Any]]:
  reader = csv.reader(io.StringIO(text, newline=""))
  header: list[str] | None = None
  while True:
    try:
      cells = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      yield reader.line_num, error
      continue
    if header is None:
      header = cells
    elif len(cells) > len(header):
      yield reader.line_num, ValueError(f"{len(cells)} cells under {len(header)} names")
    elif cells:
      yield reader.line_num, dict(zip(header, cells))


def _listed(names) -> str:
  return files.printable(", ".join(sorted(map(str, names)))[:200])
