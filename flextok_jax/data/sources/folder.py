"""A folder of image files, with captions and labels beside them, as an image source."""

from collections import Counter
from collections.abc import Callable
import itertools
import os
from typing import Any

from flextok_jax.core.errors import warn_once
from flextok_jax.core.files import check_regular, printable
from flextok_jax.data import listing
from flextok_jax.data.sources import captions
from flextok_jax.data.sources.base import (
  VALIDATION_PERCENT,
  Record,
  StoredImages,
  UnreadableRecord,
  check_size,
  in_split,
  stored_record,
)
from flextok_jax.data.sources.metadata import Metadata

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test"}


class Folder(StoredImages):
  """The pictures under a folder (data/listing.py); the class is the first subfolder, in natural order (2 before 10).

  metadata.jsonl or metadata.csv, in any subfolder, has a row per picture: file_name, captions and a label, which is a
  number or a name and replaces the class. Without captions there, those of X.jpg are the lines of X.txt or X.caption,
  else X.json ({"caption": str} or {"captions": [str, ...]}), else the class name.

  Args:
    split: "train" or "validation".
    path: the folder; "" for the validation split of a val_path alone, whose classes are its own.
    val_path: folder of the validation split; "": VALIDATION_PERCENT percent of path, at least one picture, selected by
      a hash of the relative path. Labels number the classes of path in both splits; a file outside of them has label
      -1.
    caption_key: field of the captions in metadata and .json files; "": see captions.KEYS.
    label_key: field of the label in metadata; "": "label", if there is one.

  Raises:
    FileNotFoundError, ValueError: a folder is missing, is empty, or contains the other one.
  """

  def __init__(self, split: str, path: str, val_path: str = "", caption_key: str = "", label_key: str = ""):
    if not path and not (val_path and split == "validation"):
      raise ValueError("source 'folder' has no path: set data.sources.folder.path to a folder of images")
    if path and val_path and _nested(path, val_path):
      raise ValueError(f"source 'folder': val_path {val_path} overlaps path {path}: give two separate folders")
    path = path or val_path
    self._root, self._caption_key, self._label_key = path, caption_key, label_key
    found = listing.scan(path)
    self._metadata = Metadata(path, found, caption_key, label_key)
    if label_key and not self._metadata.has_labels:
      raise ValueError(f"label_key={label_key!r} needs a {' or '.join(listing.METADATA)} in {printable(path)}")
    if self._metadata.has_labels:
      self.class_names = self._metadata.class_names()
    else:
      self.class_names = found.classes
      _report_classes(path, found)
    self._labels = {name: i for i, name in enumerate(self.class_names)}
    if not val_path:
      chosen = in_split(found.keys, split, VALIDATION_PERCENT)
      self._files = list(itertools.compress(found.files, chosen))
    elif split == "validation" and val_path != path:
      self._root = val_path
      found = listing.scan(val_path)
      self._metadata = Metadata(val_path, found, caption_key, label_key)
      self._files = found.files
      self._report_unknown(path)
    else:
      self._files = found.files
    if not self._files:
      raise ValueError(
        f"the image folder {path} is too small to hold out a picture (the {split} split is empty): set "
        "data.sources.folder.val_path to a second folder"
      )

  def __len__(self) -> int:
    return len(self._files)

  def view(self, index: int, decode: Callable[[Any], Any], with_captions: bool = True) -> Record:
    file = self._files[index]
    path = os.path.join(self._root, file)
    try:
      check_regular(path)
      with open(path, "rb") as f:
        check_size(os.fstat(f.fileno()).st_size)
        image = decode(f)
    except (OSError, ValueError) as error:
      raise UnreadableRecord(path, error) from error
    texts = self._captions(file) if with_captions else ()
    return stored_record(image, self._label(file), texts)

  def _name(self, file: str) -> str:
    """Returns the name of the class of a picture; "" if it has none."""
    if self._metadata.has_labels:
      return listing.normal(str(self._metadata.labels.get(file, "")))
    return listing.class_of(file)

  def _label(self, file: str) -> int:
    name = self._name(file)
    if self._metadata.has_labels and not self.class_names:
      number = captions.label_number(name)
      return -1 if number is None else number
    return self._labels.get(name, -1)

  def _captions(self, file: str) -> tuple[str, ...]:
    if found := self._metadata.captions.get(file):
      return found
    stem = os.path.join(self._root, os.path.splitext(file)[0])
    # .json first if its field is named
    for suffix in sorted(listing.CAPTION_FILES, key=lambda name: (name.lower() == ".json") != bool(self._caption_key)):
      try:
        check_regular(stem + suffix)
        with open(stem + suffix, "rb") as f:
          data = f.read(captions.MAX_BYTES + 1)
      except FileNotFoundError:
        continue
      except OSError as error:
        warn_once(f"No caption in {printable(stem + suffix)}: it {error.strerror or error}")
        continue
      if found := captions.in_file(stem + suffix, data, f"source 'folder', {printable(self._root)}", self._caption_key):
        return found
    if self._metadata.captions or not self.class_names:
      return ()
    return captions.clean([printable(self._name(file)).replace("_", " ")])

  def _report_unknown(self, path: str):
    unknown = Counter(name for name in map(self._name, self._files) if name and name not in self._labels)
    if unknown and self.class_names:
      warn_once(
        f"source 'folder': {sum(unknown.values())} pictures of {printable(self._root)} are of classes that"
        f" {printable(path)} does not have ({_listed(unknown)}): their label is -1"
      )


def _report_classes(path: str, found: listing.Found):
  """Logs what may surprise in the numbers of classes."""
  names, folder = found.classes, f"source 'folder', {printable(path)}"
  if names and set(map(str.lower, names)) <= _SPLIT_NAMES:
    warn_once(f"{folder}: the subfolders {_listed(names)} look like splits, not classes: set path and val_path to them")
  if list(names) != sorted(names):
    warn_once(f"{folder}: classes are numbered in natural order, as 2 before 10: {_listed(names)}")
  if empty := set(names) - set(map(listing.class_of, found.files)):
    listed = _listed(sorted(empty, key=listing.natural))
    warn_once(f"{folder}: {len(empty)} classes have no picture, and keep their numbers: {listed}")


def _listed(names) -> str:
  """Returns the first of some names."""
  names = [printable(name)[:40] for name in names]
  return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _nested(one: str, other: str) -> bool:
  one, other = os.path.realpath(one), os.path.realpath(other)
  return os.path.commonpath((one, other)) in (one, other)
