"""WebDataset tar files as an image source, read at random access."""

from collections import Counter
from collections.abc import Callable, Iterator
import glob
import io
import itertools
import json
import os
import posixpath
import re
from typing import Any

import numpy as np

from flextok_jax.core.errors import first_line, warn_once
from flextok_jax.core.files import check_regular, printable
from flextok_jax.core.images import EXTENSIONS
from flextok_jax.data import listing
from flextok_jax.data.sources import captions, tar
from flextok_jax.data.sources.base import (
  VALIDATION_PERCENT,
  Record,
  StoredImages,
  UnreadableRecord,
  check_size,
  in_split,
  stored_record,
)

_MOST_FILES = 1_000_000  # that a pattern may name
_BRACES = re.compile(r"\{([^{}]*)\}")
_PARTS = ("picture", "txt", "json", "cls")  # of a sample: columns (first byte, bytes) of the index
_COLUMNS = 1 + 2 * len(_PARTS)  # of the index: number of the tar file, then those of the parts, -1 for a missing one


class WebDataset(StoredImages):
  """The samples of tar files: consecutive or not, files of one name up to its first dot belong together.

  A sample X has a picture, such as X.jpg; captions in X.txt (one per line), else X.json; and a label, an integer in
  X.cls, else X.json. An index of all files is made from their headers when the source is opened. Every sample can so be
  read at random access: order, shuffling and resumption are those of all sources. The part of an archive before a
  damaged header is read, and a warning says where it ends.

  Args:
    split: "train" or "validation".
    path: "DIR/{00000..00099}.tar", with lists {a,b} and ranges in braces; "DIR/*.tar"; or a folder of tar files.
    val_path: the same of the validation split; "": VALIDATION_PERCENT percent of the samples, selected by a hash of
      their names and that of their tar file.
    caption_key: field of the captions in .json files, in place of .txt files; "": see captions.KEYS.
    label_key: field of the label in .json files, in place of .cls files; "": "label" and "cls".

  Raises:
    FileNotFoundError, ValueError: a file is missing or no tar archive, there are no samples, or the splits overlap.
  """

  def __init__(self, split: str, path: str, val_path: str = "", caption_key: str = "", label_key: str = ""):
    if not path:
      raise ValueError(
        "source 'webdataset' has no path: set data.sources.webdataset.path to tar files, as DIR/{00000..00099}.tar"
      )
    self._caption_key, self._label_key = caption_key, label_key
    paths = find_tars(path)
    if val_path:
      others = find_tars(val_path)
      if shared := set(map(os.path.realpath, paths)) & set(map(os.path.realpath, others)):
        raise ValueError(f"source 'webdataset': path and val_path both have {printable(min(shared))}")
      paths = others if split == "validation" else paths
    self._paths = paths
    self._name = f"source 'webdataset', {printable(val_path if val_path and split == 'validation' else path)}"
    left_out: Counter[str] = Counter()
    parts = [_index(number, file, left_out) for number, file in enumerate(paths)]
    keys, rows = [key for found, _ in parts for key in found], np.concatenate([found for _, found in parts])
    if left_out:
      warn_once(f"left out of {self._name}: {listing.describe(left_out)}")
    if not keys:
      raise ValueError(f"{self._name} has no picture ({listing.describe(left_out) or 'it is empty'})")
    if not val_path:
      rows = rows[np.array(in_split(keys, split, VALIDATION_PERCENT))]
    if not len(rows):
      raise ValueError(
        f"{self._name} is too small to hold out a picture (the {split} split is empty): set"
        " data.sources.webdataset.val_path to other tar files"
      )
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows)

  def view(self, index: int, decode: Callable[[Any], Any], with_captions: bool = True) -> Record:
    number, *places = map(int, self._rows[index])
    parts = {part: (begin, size) for part, begin, size in zip(_PARTS, places[::2], places[1::2]) if begin >= 0}
    path = self._paths[number]
    begin, size = parts["picture"]
    name = f"{path} [byte {begin}]"
    try:
      check_size(size)
      with open(path, "rb", buffering=0) as f:
        name = f"{path}/{tar.name_before(f.fileno(), begin)}"
        image = decode(io.BytesIO(os.pread(f.fileno(), size, begin)))
        texts = {
          part: os.pread(f.fileno(), min(parts[part][1], captions.MAX_BYTES + 1), parts[part][0])
          for part in (*(["txt"] if with_captions else []), "json", "cls")
          if part in parts
        }
    except (OSError, ValueError) as error:
      raise UnreadableRecord(name, error) from error
    stem = posixpath.splitext(name)[0]
    found = self._captions(stem, texts) if with_captions else ()
    return stored_record(image, self._label(stem, texts), found)

  def _captions(self, stem: str, texts: dict[str, bytes]) -> tuple[str, ...]:
    for part in ("json", "txt") if self._caption_key else ("txt", "json"):
      data = texts.get(part)
      if data is not None and (found := captions.in_file(f"{stem}.{part}", data, self._name, self._caption_key)):
        return found
    return ()

  def _label(self, stem: str, texts: dict[str, bytes]) -> int:
    if "cls" in texts and not self._label_key:
      value: Any = texts["cls"][:100].decode(errors="replace").strip()
    elif "json" in texts:
      value = _label_field(texts["json"], (self._label_key,) if self._label_key else ("label", "cls"))
      if value is None:
        return -1
    else:
      return -1
    number = captions.label_number(value)
    if number is None:
      name = printable(str(value)[:40])
      warn_once(
        f"{self._name}: labels like {name!r} of {printable(stem)} are no numbers: their label is -1",
        key=f"{self._name} label",
      )
      return -1
    return number


def find_tars(pattern: str) -> list[str]:
  """Returns the tar files that a pattern names, those of braces in their order, others in natural order.

  Raises:
    FileNotFoundError, ValueError: a file is missing or not regular, or a pattern names none or too many.
  """
  if os.path.isdir(pattern):
    paths, left_out = [], Counter[str]()
    for name in sorted(os.listdir(pattern), key=listing.natural):
      path = os.path.join(pattern, name)
      if listing.is_left_out(name):
        left_out["hidden files"] += 1
      elif not os.path.isfile(path):
        left_out["folders" if os.path.isdir(path) else "not regular files"] += 1
      elif name.endswith(".tar"):
        paths.append(path)
      else:
        left_out[listing.extension(name)] += 1
    missing = f"the folder {printable(pattern)} has no .tar file ({listing.describe(left_out) or 'it is empty'})"
    if left_out and paths:
      warn_once(f"left out of source 'webdataset', {printable(pattern)}: {listing.describe(left_out)}")
  else:
    paths = []
    for path in _expand(pattern, pattern):
      matches = glob.glob(path) if re.search(r"[*?]", path) else []
      paths += sorted(matches, key=listing.natural) or [path]
    missing = ""
  for path in paths:
    try:
      check_regular(path)
    except FileNotFoundError:
      raise FileNotFoundError(
        f"the tar file {printable(path)} does not exist: see data.sources.webdataset.path"
      ) from None
    except (OSError, ValueError) as error:
      raise ValueError(f"the tar file {printable(path)} cannot be read: it {first_line(error)}") from None
  if not paths:
    raise FileNotFoundError(missing)
  if len({*map(os.path.realpath, paths)}) < len(paths):
    raise ValueError(f"{printable(pattern)} names a tar file twice")
  return paths


def _expand(text: str, pattern: str) -> Iterator[str]:
  """Yields the texts that braces stand for: {00..12} and {a,b}."""
  parts = _BRACES.split(text)  # between braces, within, ...
  choices: list[Any] = []
  count = 1
  for i, part in enumerate(parts):
    if not i % 2:
      choices.append((part,))
      continue
    if ends := re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", part):
      first, last = int(ends[1]), int(ends[2])
      width = max(map(len, ends.groups())) if any(len(end) > 1 and end[0] == "0" for end in ends.groups()) else 1
      values = range(first, last + 1)
      choices.append(map(f"{{:0{width}d}}".format, values) if len(values) <= _MOST_FILES else ())
      number = last - first + 1
    else:
      choices.append(part.split(","))
      number = len(choices[-1])
    if number < 1:
      raise ValueError(f"{printable(pattern)} has an empty range {{{part}}}: write {{first..last}}")
    count *= number
  if count > _MOST_FILES:
    raise ValueError(f"{printable(pattern)[:80]} names {count} files: at most {_MOST_FILES}")
  return map("".join, itertools.product(*choices))


def _index(number: int, path: str, left_out: Counter[str]) -> tuple[list[str], np.ndarray]:
  """Returns the keys of the samples of a tar file that have a picture, and their rows of the index."""
  samples: list[tuple[str, dict[str, tuple[int, int]]]] = []  # (key, {kind of file: (first byte, bytes)})
  current: dict[str, dict[str, tuple[int, int]]] = {}
  damage = ""
  try:
    with open(path, "rb", buffering=0) as f:
      for name, begin, size in tar.entries(f.fileno(), os.fstat(f.fileno()).st_size):
        folder, base = posixpath.split(name)
        stem, _, kind = base.lower().partition(".")
        if any(listing.is_left_out(part) for part in name.split("/") if part not in ("", ".", "..")):
          left_out["hidden files"] += 1
        elif size < 0:
          left_out["links or devices"] += 1
        elif kind not in _PARTS and posixpath.splitext(base)[1].lower() not in EXTENSIONS:
          left_out[listing.extension(base)] += 1
        else:
          key = f"{os.path.basename(path)}/{posixpath.join(folder, base[: len(stem)])}"
          if kind in current.setdefault(key, {}) or not current[key]:  # again: another sample, of joined archives
            current[key] = {}
            samples.append((key, current[key]))
          current[key][kind] = begin, size
  except OSError as error:
    raise ValueError(f"the tar file {printable(path)} cannot be read: {error.strerror}") from None
  except tar.Damage as error:
    damage = f"the tar file {printable(path)} {error}"
  keys, rows = [], []
  for key, sample in samples:
    pictures = sorted((kind for kind in sample if kind not in _PARTS), key=lambda kind: kind.count("."))
    if pictures:
      parts = {**sample, "picture": sample[pictures[0]]}
      keys.append(key)
      rows.append([number, *itertools.chain.from_iterable(parts.get(part, (-1, -1)) for part in _PARTS)])
      for kind in pictures[1:]:
        left_out[f"further .{printable(kind)[:20]} of samples with a .{printable(pictures[0])[:20]}"] += 1
    else:
      left_out["samples without a picture"] += 1
  if damage and not keys:
    raise ValueError(f"{damage}: replace it or leave it out")
  if damage:
    warn_once(f"{damage}: the {len(keys)} samples before are read; replace the file to get the others")
  return keys, np.array(rows, np.int64).reshape(len(rows), _COLUMNS)


def _label_field(data: bytes, names: tuple[str, ...]) -> Any:
  try:
    fields = json.loads(data)
  except (ValueError, RecursionError):
    return None
  return (
    next((fields[name] for name in names if fields.get(name) is not None), None) if isinstance(fields, dict) else None
  )
