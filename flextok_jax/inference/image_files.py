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

from flextok_jax.core import files, unreadable
from flextok_jax.core.progress import Bar
from flextok_jax.data import pipeline, transforms
from flextok_jax.inference import batches, token_files, validation
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.ops import fsq
from flextok_jax.parallel import batching

_THREADS = 8  # that read images


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
) -> Written:
  """Writes the token ids of image files to a token file.

  Args:
    named: (path, name) of each image, see transforms.name_images. Bytes of a name that are not UTF-8 become \\xNN.
    out: the token file, whose suffix says its format (token_files.check_suffix).
    num_tokens: ids per image; default: all.
    progress: whether a bar shows the images done; None: a bar on a terminal, and elsewhere lines.

  Raises:
    ValueError: an argument out of range, no image can be read, another run writes `out`, or it cannot be written.
  """
  validation.at_least_one("batch_size", batch_size)
  num_tokens = validation.token_count(num_tokens, model.num_registers)
  names = (files.as_text(name) for _, name in named)
  token_files.check_json_size(out, names, num_tokens, fsq.num_codes(model.config.tokens.levels))
  facts = token_files.Facts(model.fingerprint, model.image_size, num_tokens)
  part = out.with_name(f"{files.shorten(out.name)}.part")
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.open_regular(part) as file:
      _lock(file, out)
      results = _Results(file, list(dataclasses.astuple(facts)), named)
      if results.done:
        print(f"{results.done} of {len(named)} images are done already, from {part}", flush=True)
      with Bar(len(named), "images", progress, results.done) as bar:
        for rows in _encode(model, named, results.done, num_tokens, batch_size):
          results.append(rows)
          bar(results.done)
      if not results.images:
        part.unlink()
        raise ValueError(f"none of the {len(named)} images can be read; the first is {results.reason}")
      token_files.write_tokens(out, facts, results)
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

  Attributes:
    done: number of the first images that the file has results of.
    images: how many of these are readable.
    reason: name and reason of the first that is not; "" if all are.
  """

  def __init__(self, file: BinaryIO, header: list, named: Sequence[tuple[str, str]]) -> None:
    self._file = file
    self.done, self.images, self.reason = 0, 0, ""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    end = 0  # of the lines to keep
    if _parse(file.readline()) == header:
      end = file.tell()
      for (path, name), line in zip(named, iter(file.readline, b"")):
        row = _parse(line)
        if not isinstance(row, list) or row[:3] != _identity(path, name) or not _is_result(row[3:], header[-1]):
          break
        self._count(row)
        end = file.tell()
    file.seek(end)
    file.truncate()
    if not end:
      if size:
        print(f"{file.name} is of another tokenizer or number of tokens: starting over", flush=True)
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

  def __iter__(self) -> Iterator[tuple[str, list[int]]]:
    self._file.seek(0)
    self._file.readline()
    for line in self._file:
      name, _, _, ids = json.loads(line)
      if not isinstance(ids, str):
        yield name, ids


def _parse(line: bytes) -> Any:
  try:
    return json.loads(line) if line.endswith(b"\n") else None
  except (ValueError, RecursionError):
    return None


def _is_result(items: list, num_tokens: int) -> bool:
  """Returns whether the items are [ids] or [reason]."""
  if len(items) != 1 or not isinstance(items[0], list):
    return len(items) == 1 and isinstance(items[0], str)
  return len(items[0]) == num_tokens and all(type(token) is int and 0 <= token < 2**31 for token in items[0])


def _identity(path: str, name: str) -> list:
  """Returns what tells whether a file is the same as before: its name, its size and the time of its last change."""
  try:
    status = os.stat(path)
  except OSError:
    return [files.as_text(name), None, None]
  return [files.as_text(name), status.st_size, status.st_mtime_ns]


class _Rows:
  """The images from number `first` on, at random access: rows of _Results whose last item is the image or a reason."""

  def __init__(self, named: Sequence[tuple[str, str]], first: int, size: int):
    self._named, self._first, self._size = named, first, size

  def __len__(self) -> int:
    return len(self._named) - self._first

  def __getitem__(self, index: int) -> dict[str, list]:
    path, name = self._named[self._first + int(index)]
    identity = _identity(path, name)
    try:
      return {"row": [*identity, transforms.load_image(path, self._size)]}
    except ValueError as error:
      return {"row": [*identity, str(error)]}


def _encode(
  model: FlexTok, named: Sequence[tuple[str, str]], first: int, num_tokens: int, batch_size: int
) -> Iterator[list[list]]:
  """Yields rows of _Results in order."""
  size = batching.batch_rows(batch_size, max(len(named) - first, 1), batches.local_mesh())
  loading = pipeline.Loading(num_threads=min(_THREADS, os.cpu_count() or 1), num_workers=0, prefetch=2)
  read = pipeline.read_ahead(_Rows(named, first, model.image_size), size, loading, drop_remainder=False, batch_fn=list)
  waiting: deque[list[list]] = deque([[]])  # rows of the batches that are being encoded, and then of the next

  def images() -> Iterator[np.ndarray]:
    crops = []
    for row in (element["row"] for elements in read for element in elements):
      waiting[-1].append(row)
      if isinstance(row[3], str):
        continue
      crops.append(row[3])
      row[3] = None
      if len(crops) == size:
        waiting.append([])
        yield np.stack(crops)
        crops = []
    if crops:
      waiting.append([])
      yield np.stack(crops)

  for ids in batches.tokenize_batches(model, images(), size, num_tokens):
    rows, found = waiting.popleft(), iter(ids.tolist())
    for row in rows:
      row[3] = next(found) if row[3] is None else row[3]
    yield rows
  if waiting[0]:
    yield waiting[0]  # unreadable ones after the last image
