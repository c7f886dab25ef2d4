"""Tokenization of any number of image files into one token file, in constant memory.

Results are appended to FILE.part as they are computed, one JSON line per image, so a run that is stopped goes on where
it was. A file that cannot be read is left out and named, and the others are kept.
"""

from collections import deque
from collections.abc import Iterator, Sequence
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from flextok_jax.config.ranges import MAX_SIDE
from flextok_jax.core import files, unreadable
from flextok_jax.core.progress import Bar
from flextok_jax.data import pipeline, transforms
from flextok_jax.data.pictures import UnreadablePicture
from flextok_jax.inference import batches, token_files, validation
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.ops import distances, fsq
from flextok_jax.parallel import batching

_THREADS = 8  # that read images
_BATCHES = 4  # that are read at once if images have several sizes


def crop(image: Any, model: FlexTok, size: tuple[int, int] | None) -> np.ndarray:
  """Returns the largest centre crop of an image in the shape of a size, resized to it: uint8 [h, w, 3].

  Args:
    image: see transforms.to_rgb.
    model: the tokenizer, to whose square image_size it is cropped if size is None, as FlexTok.tokenize does.
    size: (height, width) or None.
  """
  if size is None:
    return transforms.center_crop(image, model.image_size)
  return np.asarray(ImageOps.fit(transforms.to_rgb(image), (size[1], size[0]), Image.Resampling.BILINEAR))


def load_crops(paths: Any, model: FlexTok, size: tuple[int, int] | None) -> tuple[np.ndarray, list[str]]:
  """Returns the crops uint8 [n, h, w, 3] and the names of image files and folders (transforms.name_images).

  Raises:
    FileNotFoundError, ValueError: see transforms.load_images.
  """
  if size is None:
    return transforms.load_images(paths, model.image_size)
  named, images = transforms.name_images(paths), []
  for path, _ in named:
    try:
      images.append(crop(path, model, size))
    except UnreadablePicture as error:
      raise ValueError(f"the image {files.printable(path)} cannot be read: {error}") from error
  return np.stack(images), [name for _, name in named]


@dataclasses.dataclass(frozen=True)
class Written:
  """What tokenize_files wrote: images in the token file, and those left out with the reason of the first."""

  images: int
  num_tokens: int
  unreadable: int
  reason: str


def tokenize_files(
  model: FlexTok,
  named: Sequence[tuple[str, str]],
  out: Path,
  num_tokens: int | None = None,
  batch_size: int = 32,
  progress: bool | None = False,
  resize: str = "crop",
  quality: float | None = None,
  metric: str = "mse",
) -> Written:
  """Writes the token ids of image files to a token file.

  Args:
    named: (path, name) of each image, see transforms.name_images. Bytes of a name that are not UTF-8 become \\xNN.
    out: the token file, whose suffix says its format (token_files.check_suffix).
    num_tokens: ids per image; default: all.
    progress: whether a bar shows the images done; None: a bar on a terminal, and elsewhere lines.
    resize: "crop", "fit" or "none", see FlexTok.tokenize. With "fit" and "none" the file says the size of each image.
    quality: keep the fewest tokens of each image that decode within this distance; None: num_tokens of each.
    metric: the distance, a name of ops/distances.py.

  Raises:
    ValueError: an argument out of range, no image can be read, another run writes `out`, or it cannot be written.
  """
  validation.at_least_one("batch_size", batch_size)
  num_tokens = validation.token_count(num_tokens, model.num_registers)
  sized = validation.resize(resize) != "crop"
  if quality is not None:
    validation.quality(quality)
    distances.resolve(metric)
    if out.suffix != ".json":
      raise ValueError(f"out={out}: sequences of different lengths, those of a quality, are written to .json files")
  names = (files.as_text(name) for _, name in named)
  token_files.check_json_size(out, names, num_tokens, fsq.num_codes(model.config.tokens.levels), sized)
  facts = token_files.Facts(model.fingerprint, model.image_size, num_tokens)
  part = out.with_name(f"{files.shorten(out.name)}.part")
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.open_regular(part) as file:
      _lock(file, out)
      header = [*dataclasses.astuple(facts)]
      if sized or quality is not None:  # what else the ids depend on
        header += [resize, quality, metric, model.config.sampler.to_dict()]
      results = _Results(file, json.loads(json.dumps(header)), named, sized, quality is not None)
      if results.done:
        print(f"{results.done} of {len(named)} images are done already, from {part}", flush=True)
      with Bar(len(named), "images", progress, results.done) as bar:
        goal = resize, quality, metric
        for rows in _encode(model, named, results.done, num_tokens, batch_size, *goal):
          results.append(rows)
          bar(results.done)
      if not results.images:
        part.unlink()
        raise ValueError(f"none of the {len(named)} images can be read; the first is {results.reason}")
      token_files.write_tokens(out, facts, results, results.sizes if sized else None)
      part.unlink()
  except OSError as e:
    raise ValueError(f"cannot write {part}: {e.strerror}; rerun the same command to go on") from e
  return Written(results.images, num_tokens, len(named) - results.images, results.reason)


def _lock(file: BinaryIO, out: Path) -> None:
  try:
    files.lock(file)
  except BlockingIOError:
    raise ValueError(f"another run writes {out}: wait for it, or stop it") from None


class _Results:
  """The lines of FILE.part: a header, and [name, bytes, time of change, ids or the reason why it is unreadable] each.

  Iterates over (name, ids) of the readable images.

  Args:
    header: fingerprint, image size, number of tokens, and other settings that affect the ids.
    sized: whether [height, width] of the image follows the ids.
    ragged: whether images may have fewer tokens.

  Attributes:
    done: number of the first images that the file has results of.
    images: how many of these are readable.
    reason: name and reason of the first that is not; "" if all are.
  """

  def __init__(
    self, file: BinaryIO, header: list, named: Sequence[tuple[str, str]], sized: bool = False, ragged: bool = False
  ) -> None:
    self._file = file
    self.sizes = _Sizes(self)
    self.done, self.images, self.reason = 0, 0, ""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    end = 0  # of the lines to keep
    if _parse(file.readline()) == header:
      end = file.tell()
      for (path, name), line in zip(named, iter(file.readline, b"")):
        row = _parse(line)
        if not isinstance(row, list) or row[:3] != _identity(path, name):
          break
        if not _is_result(row[3:], header[2], sized, ragged):
          break
        self._count(row)
        end = file.tell()
    file.seek(end)
    file.truncate()
    if not end:
      if size:
        print(f"{file.name} is of another tokenizer, number of tokens or way to resize: starting over", flush=True)
      self._write([header])

  def append(self, rows: list[list]) -> None:
    """Adds the results of the next images."""
    for row in rows:
      self._count(row)
      if isinstance(row[3], str):
        unreadable.skip(row[3])
    self._write(rows)

  def _count(self, row: list) -> None:
    self.done += 1
    if isinstance(row[3], str):
      self.reason = self.reason or row[3]
    else:
      self.images += 1

  def _write(self, rows: list[list]) -> None:
    self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    self._file.flush()

  def rows(self) -> Iterator[list]:
    """Yields the lines of the readable images."""
    self._file.seek(0)
    self._file.readline()
    for line in self._file:
      row = json.loads(line)
      if not isinstance(row[3], str):
        yield row

  def __iter__(self) -> Iterator[tuple[str, list[int]]]:
    return ((row[0], row[3]) for row in self.rows())


class _Sizes:
  """The sizes of the readable images of _Results, which may be iterated several times."""

  def __init__(self, results: _Results) -> None:
    self._results = results

  def __iter__(self) -> Iterator[tuple[int, int]]:
    return ((height, width) for *_, (height, width) in self._results.rows())


def _parse(line: bytes) -> Any:
  try:
    return json.loads(line) if line.endswith(b"\n") else None
  except (ValueError, RecursionError):
    return None


def _is_result(items: list, num_tokens: int, sized: bool, ragged: bool) -> bool:
  """Returns whether the items are [ids], if sized [ids, [height, width]], or [reason]."""
  if not items or not isinstance(items[0], list):
    return len(items) == 1 and isinstance(items[0], str)
  ids, *size = items
  whole = lambda values, low, high: isinstance(values, list) and all(type(x) is int and low <= x < high for x in values)
  if not (len(size) == sized and all(len(x) == 2 and whole(x, 1, MAX_SIDE + 1) for x in size)):
    return False
  return (1 if ragged else num_tokens) <= len(ids) <= num_tokens and whole(ids, 0, 2**31)


def _identity(path: str, name: str) -> list:
  """Returns what tells whether a file is the same as before: its name, its size and the time of its last change."""
  try:
    status = os.stat(path)
  except OSError:
    return [files.as_text(name), None, None]
  return [files.as_text(name), status.st_size, status.st_mtime_ns]


class _Rows:
  """The images from number `first` on, at random access: rows of _Results whose last item is the image or a reason."""

  def __init__(self, named: Sequence[tuple[str, str]], first: int, size: int, resize: str, multiple: int):
    self._named, self._first, self._size = named, first, size
    self._resize, self._multiple = resize, multiple

  def __len__(self) -> int:
    return len(self._named) - self._first

  def __getitem__(self, index: int) -> dict[str, list]:
    path, name = self._named[self._first + int(index)]
    identity = _identity(path, name)
    try:
      image = transforms.load_image(path, self._size, self._resize, self._multiple)
    except ValueError as error:
      return {"row": [*identity, str(error)]}
    try:
      if self._resize != "crop":
        validation.image_size(image.shape[:2], self._multiple)
    except ValueError as error:
      return {"row": [*identity, f"the image {files.printable(path)} has a size that cannot be used: {error}"]}
    return {"row": [*identity, image]}


def _encode(
  model: FlexTok,
  named: Sequence[tuple[str, str]],
  first: int,
  num_tokens: int,
  batch_size: int,
  resize: str,
  quality: float | None,
  metric: str,
) -> Iterator[list[list]]:
  """Yields rows of _Results in order."""
  size = batching.batch_rows(batch_size, max(len(named) - first, 1), batches.local_mesh())
  loading = pipeline.Loading(num_threads=min(_THREADS, os.cpu_count() or 1), num_workers=0, prefetch=2)
  source = _Rows(named, first, model.image_size, resize, model.patch_multiple)
  read = pipeline.read_ahead(source, size, loading, drop_remainder=False, batch_fn=list)
  window = size if resize == "crop" else size * _BATCHES  # images that are in memory, so that batches are of one size
  # Of each batch that is being encoded: its rows, and those that are complete with it. Last, the rows read since.
  waiting: deque[tuple[list[list], list[list]]] = deque()
  rest: list[list] = []

  def batches_of(rows: list[list]) -> Iterator[np.ndarray]:
    """Yields batches of one size of the images in the rows, which are complete with the last batch."""
    groups: dict[tuple[int, ...], list[list]] = {}
    for row in rows:
      if not isinstance(row[3], str):
        groups.setdefault(row[3].shape, []).append(row)
    parts = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    for part in parts:
      waiting.append((part, rows if part is parts[-1] else []))
      images = np.stack([row[3] for row in part])
      for row in part:
        row[3:] = [None, *([images.shape[1:3]] if resize != "crop" else [])]
      yield images

  def images() -> Iterator[np.ndarray]:
    count = 0  # readable images in `rest`
    for row in (element["row"] for elements in read for element in elements):
      rest.append(row)
      count += not isinstance(row[3], str)
      if count == window:
        rows, count = rest.copy(), 0
        rest.clear()
        yield from batches_of(rows)
    if count:
      rows = rest.copy()
      rest.clear()
      yield from batches_of(rows)

  for ids, lengths in batches.tokenize_to_quality(model, images(), size, num_tokens, quality, metric):
    part, complete = waiting.popleft()
    for row, found, length in zip(part, ids.tolist(), [None] * len(part) if lengths is None else lengths):
      row[3] = found[:length]
    if complete:
      yield complete
  if rest:
    yield rest  # unreadable ones after the last image
