"""What all image sources share: records, reading past unreadable ones, validation splits, endless sources."""

from collections.abc import Callable, Iterable
import hashlib
from typing import Any, NotRequired, Protocol, TypedDict

from absl import logging
import numpy as np

from flextok_jax.core.errors import first_line
from flextok_jax.data import transforms

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
    super().__init__(f"{name}: {first_line(reason)}")
    self.name = name
    self.reason = first_line(reason)

  def __reduce__(self):
    return UnreadableRecord, (self.name, self.reason)


class StoredImages:
  """A source of image files: view(index, decode) returns a record with the image decode(open file).

  So the caller can decode only as much of a file as it needs.
  """

  framed = False
  flip = True
  class_names: tuple[str, ...] = ()

  def view(self, index: int, decode: Callable[[Any], Any]) -> Record:
    raise NotImplementedError

  def __getitem__(self, index: int) -> Record:
    return self.view(index, transforms.to_rgb)


def view(source: Source, index: int, decode: Callable[[Any], Any]) -> Record:
  """Returns source[index] with the image decode(image); decode gets the open file if the source stores files."""
  if isinstance(source, StoredImages):
    return source.view(index, decode)
  record = source[index]
  return {**record, "image": decode(record["image"])}


_logged: set[str] = set()  # names of unreadable records that are in the log already


def read(source: Source, index: int, decode: Callable[[Any], Any] | None = None) -> tuple[Record, int]:
  """Returns the record at index, or the next readable one (wrapping around), and the number of records skipped.

  Each process logs each unreadable record once.

  Args:
    decode: as of view; None: source[i].

  Raises:
    ValueError: MAX_RUN consecutive records are unreadable.
  """
  skipped = 0
  while True:
    position = (index + skipped) % len(source)
    try:
      record = source[position] if decode is None else view(source, position, decode)
      return {"captions": (record["caption"],), **record}, skipped
    except UnreadableRecord as error:
      skipped += 1
      if error.name not in _logged:
        _logged.add(error.name)
        logging.warning("Skipped unreadable image %s", error)
      if skipped >= min(MAX_RUN, len(source)):
        raise ValueError(f"{skipped} consecutive images are unreadable, the last one is {error}") from error


def held_out(key: str, percent: int) -> bool:
  """Returns whether a key is in the validation split: a stable hash selects `percent` percent of all keys."""
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 < percent


def generator(split: str, index: int) -> np.random.Generator:
  """Returns the random generator of a record of an endless source; it depends on (split, index) alone."""
  return np.random.Generator(np.random.Philox(key=[_SPLIT_KEYS[split], int(index)]))


def stored_record(image: Any, label: int, captions: tuple[str, ...], num_objects: int = -1) -> Record:
  """Returns a record with one or more captions."""
  return {"image": image, "label": label, "caption": captions[0], "captions": captions, "num_objects": num_objects}


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
  """Returns the captions that are not blank, each as one line; ValueError if there is none."""
  cleaned = tuple(line for line in (" ".join(caption.split()) for caption in captions) if line)
  if not cleaned:
    raise ValueError("no caption")
  return cleaned
