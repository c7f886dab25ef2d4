"""A folder of image files with captions beside them as an image source."""

from collections.abc import Callable
import json
import os
from typing import Any

from flextok_jax.data import transforms
from flextok_jax.data.sources.base import (
  Record,
  StoredImages,
  UnreadableRecord,
  clean_captions,
  held_out,
  stored_record,
)

VALIDATION_PERCENT = 5  # of the files, without val_path
MAX_CAPTION_BYTES = 1_000_000  # of a caption file


class Folder(StoredImages):
  """The jpg, jpeg, png and webp files under a folder; the class is the first subfolder (sorted by name).

  The captions of X.jpg are the lines of X.txt, else X.json ({"caption": str} or {"captions": [str, ...]}), else the
  class name.

  Args:
    split: "train" or "validation".
    path: the folder.
    val_path: folder of the validation split; "": VALIDATION_PERCENT percent of path, selected by a hash of the
      relative path. Labels number the classes of path in both splits; a file outside of them has label -1.

  Raises:
    FileNotFoundError, ValueError: a folder is missing, is empty, or contains the other one.
  """

  def __init__(self, split: str, path: str, val_path: str = ""):
    if not path:
      raise ValueError("source 'folder' has no path: set data.sources.folder.path to a folder of images")
    if val_path and _nested(path, val_path):
      raise ValueError(f"source 'folder': val_path {val_path} overlaps path {path}: give two separate folders")
    files = _relative_files(path)
    self.class_names = tuple(sorted({_class_of(f) for f in files} - {""}))
    self._labels = {name: i for i, name in enumerate(self.class_names)}
    self._root = path
    if not val_path:
      files = [f for f in files if is_validation(f) == (split == "validation")]
    elif split == "validation":
      self._root, files = val_path, _relative_files(val_path)
    if not files:
      raise ValueError(
        f"the image folder {path} is too small to hold out {VALIDATION_PERCENT} percent (the {split} split is empty): "
        "set data.sources.folder.val_path to a second folder"
      )
    self._files = files

  def __len__(self) -> int:
    return len(self._files)

  def view(self, index: int, decode: Callable[[Any], Any]) -> Record:
    file = self._files[index]
    path = os.path.join(self._root, file)
    try:
      with open(path, "rb") as f:
        image = decode(f)
    except transforms.DECODE_ERRORS as error:
      raise UnreadableRecord(path, error) from error
    name = _class_of(file)
    captions = _read_captions(os.path.splitext(path)[0]) or (name.replace("_", " "),)
    return stored_record(image, self._labels.get(name, -1), captions)


def is_validation(relative_path: str) -> bool:
  """Returns whether a file is in the validation split of a folder without val_path."""
  return held_out(relative_path.replace(os.sep, "/"), VALIDATION_PERCENT)


def _read_captions(stem: str) -> tuple[str, ...]:
  """Returns the captions in stem.txt or else stem.json; () if neither exists."""
  for path, parse in ((f"{stem}.txt", str.splitlines), (f"{stem}.json", _json_captions)):
    try:
      with open(path, "rb") as f:
        data = f.read(MAX_CAPTION_BYTES + 1)
      if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"more than {MAX_CAPTION_BYTES} bytes")
      return clean_captions(parse(data.decode("utf-8-sig")))
    except FileNotFoundError:
      continue
    except (OSError, ValueError, RecursionError) as error:
      raise UnreadableRecord(path, error) from error
  return ()


def _json_captions(text: str) -> list[str]:
  fields = json.loads(text)
  if isinstance(fields, dict):
    captions = fields["captions"] if "captions" in fields else [fields.get("caption")]
    if isinstance(captions, list) and all(isinstance(caption, str) for caption in captions):
      return captions
  raise ValueError('neither {"caption": "..."} nor {"captions": ["...", ...]}')


def _relative_files(folder: str) -> list[str]:
  return [os.path.relpath(path, folder) for path in transforms.list_images(folder)]


def _class_of(relative_path: str) -> str:
  return relative_path.split(os.sep)[0] if os.sep in relative_path else ""


def _nested(one: str, other: str) -> bool:
  one, other = os.path.realpath(one), os.path.realpath(other)
  return os.path.commonpath((one, other)) in (one, other)
