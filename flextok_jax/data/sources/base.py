"""What all image sources share: records, reading past unreadable ones, validation splits, endless sources."""

from collections.abc import Callable, Sequence
import hashlib
import os
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

from flextok_jax.core import unreadable
from flextok_jax.core.errors import first_line
from flextok_jax.core.files import printable
from flextok_jax.data import transforms

VALIDATION_PERCENT = 5  # of files, of sources without a validation split of their own
MAX_BYTES = 2**30  # of an image file
MAX_RUN = 20  # consecutive unreadable records after which reading stops
ENDLESS = 2**31 - 1  # length of a source that draws its images; more than any run reads
_SPLIT_KEYS = {"train": 0x7261696E, "validation": 0x76616C69}  # first word of the random key: separate streams


class Record(TypedDict):
  """One record of a source. Numbers are -1 where unknown."""

  image: Any  # a Pillow image or a uint8 array, as stored or drawn
  label: int
  caption: str  # the first caption; "" if there is none
  captions: NotRequired[tuple[str, ...]]  # all captions; `read` adds it to records of sources with one caption
  num_objects: int


class Source(Protocol):
  """A random-access sequence of records.

  Attributes:
    framed: whether the picture is composed already, so that the pipeline resizes it without a random crop.
    flip: whether the caption stays true when the picture is mirrored.
    class_names: names of the labels; () if they have none.
  """

  framed: bool
  flip: bool
  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record:
    """Returns a record; raises UnreadableRecord if it cannot be decoded."""


class UnreadableRecord(Exception):
  """A record that cannot be decoded: `name` identifies it, `reason` is the cause."""

  def __init__(self, name: str, reason: str | Exception):
    self.name, self.reason = printable(name), first_line(reason)
    super().__init__(f"{self.name}: {self.reason}")

  def __reduce__(self):
    return UnreadableRecord, (self.name, self.reason)


class StoredImages:
  """A source of image files: view(index, decode) returns a record with the image decode(open file).

  So the caller can decode only as much of a file as it needs, and read captions only where it uses them.
  """

  framed = False
  flip = True
  class_names: tuple[str, ...] = ()

  def view(self, index: int, decode: Callable[[Any], Any], with_captions: bool = True) -> Record:
    raise NotImplementedError

  def __getitem__(self, index: int) -> Record:
    return self.view(index, transforms.to_rgb)


def view(source: Source, index: int, decode: Callable[[Any], Any], with_captions: bool = True) -> Record:
  """Returns source[index] with the image decode(image); decode gets the open file if the source stores files.

  Without captions, those of stored files are not read: the record has the caption "".
  """
  if isinstance(source, StoredImages):
    return source.view(index, decode, with_captions)
  record = source[index]
  return {**record, "image": decode(record["image"])}


def read(
  source: Source, index: int, decode: Callable[[Any], Any] | None = None, with_captions: bool = True
) -> tuple[Record, int]:
  """Returns the record at index, or the next readable one (wrapping around), and the number of records skipped.

  Each process logs each unreadable record once.

  Args:
    decode: as of view; None: source[i].
    with_captions: as of view.

  Raises:
    ValueError: MAX_RUN consecutive records are unreadable.
  """
  skipped = 0
  while True:
    position = (index + skipped) % len(source)
    try:
      record = source[position] if decode is None else view(source, position, decode, with_captions)
      return {"captions": (record["caption"],), **record}, skipped
    except UnreadableRecord as error:
      skipped += 1
      unreadable.skip(error, key=error.name)
      if skipped >= min(MAX_RUN, len(source)):
        raise ValueError(f"{skipped} consecutive images are unreadable, the last one is {error}") from error


def held_out(key: str, percent: int) -> bool:
  """Returns whether a key is in the validation split: a stable hash selects `percent` percent of all keys."""
  return int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:4], "big") % 100 < percent


def in_split(keys: Sequence[str], split: str, percent: int) -> list[bool]:
  """Returns which keys are in a split: "validation", those that are held_out, or "train", the others.

  If all or none of several keys are held out, the one with the smallest hash changes sides: no split is empty.
  """
  chosen = [held_out(key, percent) for key in keys]
  if len(keys) > 1 and len(set(chosen)) == 1:
    first = min(range(len(keys)), key=lambda i: hashlib.sha256(os.fsencode(keys[i])).digest())
    chosen[first] = not chosen[first]
  return [validation == (split == "validation") for validation in chosen]


def generator(split: str, index: int) -> np.random.Generator:
  """Returns the random generator of a record of an endless source; it depends on (split, index) alone."""
  return np.random.Generator(np.random.Philox(key=[_SPLIT_KEYS[split], int(index)]))


def stored_record(image: Any, label: int, captions: tuple[str, ...], num_objects: int = -1) -> Record:
  """Returns a record; its only caption is "" if there is none."""
  captions = captions or ("",)
  return {"image": image, "label": label, "caption": captions[0], "captions": captions, "num_objects": num_objects}


def check_size(size: int):
  """Raises ValueError for the size of a file that no picture has, before it is read into memory."""
  if size > MAX_BYTES:
    raise ValueError(f"has {size} bytes: image files have at most {MAX_BYTES}")
