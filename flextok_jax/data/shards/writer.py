"""Writes shards (files.py) so that a killed run continues without losing or repeating a record.

Shard s has the images [s n / S, (s + 1) n / S) of one fixed sequence (split_images.py) and belongs to process
s % process_count. With several shapes each has shards of its own. A file gets its final name when it is complete, so
the folder itself shows what is left to do. plan.json, written first, has all settings that affect the records.
"""

from collections.abc import Iterable, Iterator
import contextlib
import itertools
import json
import os
from pathlib import Path
import time
from typing import Any

from array_record.python import array_record_module
from flax.traverse_util import flatten_dict
import numpy as np

from flextok_jax.core import files, unreadable
from flextok_jax.core.literals import quote
from flextok_jax.core.progress import Bar
from flextok_jax.data import pipeline
from flextok_jax.data.shapes import Shape
from flextok_jax.data.shards.files import FORMAT, META, Records, read_json, shard_name
from flextok_jax.data.shards.split_images import SplitImages
from flextok_jax.data.sources.base import MAX_RUN

PLAN = "plan.json"
RECORDS = 4096  # records per shard by default,
MAX_SHARDS = 512  # unless that makes more shards than this: a reader keeps all files open
_OPTIONS = "group_size:1,uncompressed"  # random access to single records, which do not compress
_READ = 64  # records that are read at once to check a file
_CROPS = ("crop", "crop_min_area", "flip")  # fields of ImageData that affect crops
_SHAPES = ("shapes", "shape_weights")  # likewise, if there are any


def write_shards(
  folder: str | os.PathLike,
  records: Records,
  data: pipeline.ImageData,
  *,
  seed: int,
  split: str = "train",
  num_images: int | None = None,
  copies: int = 1,
  num_shards: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> dict[str, Any] | None:
  """Writes this process's missing shards of FOLDER/<split>/; the process that finishes last writes meta.json.

  Args:
    records: makes the records from images.
    data: the images.
    seed: of their order and crops.
    num_images: None: all images of a single source that is not endless.
    copies: crops per image, the first the centre crop; 1 for image files.
    num_shards: None: as many as planned before, else about one per RECORDS records. With several shapes they are
      divided in proportion, at least one for each.

  Returns:
    meta.json as a dict, or None while shards of other processes are missing.

  Raises:
    FileNotFoundError, ValueError: an argument is out of range or differs from the folder's plan, too many images are
      unreadable, or the folder cannot be written.
  """
  for name, value in (("copies", copies), ("num_shards", num_shards), ("batch_size", records.batch_size)):
    if value is not None and value < 1:
      raise ValueError(f"{name}={value} must be at least 1")
  folder = Path(folder) / split
  images = SplitImages(data, split, seed=seed, image_size=records.image_size, num_images=num_images, copies=copies)
  settings = records.settings(images.sources)
  if num_shards is None:
    planned = (_read_plan(folder) or {}).get("shards")
    num_shards = planned or min(max(_default_shards(len(images) * copies), process_count), len(images))
  if num_shards > len(images):
    raise ValueError(f"num_shards={num_shards} is more than the {len(images)} images")
  what = records.shards.WHAT
  plan = {
    "format": FORMAT,
    "what": what,
    **settings,
    "split": split,
    "num_images": len(images),
    "copies": copies,
    "shards": num_shards,
    "seed": seed,
    "sizes": images.sizes,
    "sources": {kind: dict(data.sources[kind]) for kind in images.sizes},
  }
  if records.image_size is not None:
    plan |= {name: getattr(data, name) for name in _CROPS}
    if data.shapes:
      plan |= {name: getattr(data, name) for name in _SHAPES}
  _claim(folder, plan)

  # Which shards of this process are missing.
  bounds, shapes = _divide(images, num_shards)
  num_shards = len(shapes)
  sizes = [end - start for start, end in itertools.pairwise(bounds)]
  paths = [folder / shard_name(what, s, num_shards) for s in range(num_shards)]
  own = range(process_index, num_shards, process_count)
  tally = _Tally(sum(sizes[s] for s in own), data.max_unreadable)
  files.clear_leftovers(folder, [paths[s].name for s in own])
  missing = []
  for s in own:
    found = _count(paths[s])
    if found and found <= sizes[s] * copies and found % copies == 0:
      tally.skip(sizes[s], sizes[s] - found // copies)
    else:
      missing.append(s)
  if len(missing) < len(own):
    print(f"{len(own) - len(missing)} of {len(own)} shards exist already", flush=True)

  # Read, encode and write them.
  rows = _MissingImages(images, [(s, bounds[s], bounds[s + 1]) for s in missing])
  batch_size = max(records.batch_size // copies, 1)
  batches = pipeline.read_ahead(rows, batch_size, data.loading, drop_remainder=False, batch_fn=list)
  with pipeline.closing(batches, data.loading), Bar(tally.planned, "images", done=tally.skipped) as bar:
    elements = itertools.chain.from_iterable(batches)
    for s, group in itertools.groupby(elements, key=lambda element: element["shard"]):
      _write_shard(paths[s], records.records(tally.readable(group, bar)))
  return _finish(folder, plan, records, images, paths, shapes, tally)


def _divide(images: SplitImages, num_shards: int) -> tuple[list[int], list[Shape | None]]:
  """Returns the first image of each shard, with the end of the last, and the shape of each shard."""
  bounds, shapes = [0], []
  for shape, count in images.groups:
    parts = max(round(num_shards * count / len(images)), 1)
    bounds += [bounds[-1] + count * s // parts for s in range(1, parts + 1)]
    shapes += [shape] * parts
  return bounds, shapes


def _default_shards(num_records: int) -> int:
  return min(-(-num_records // RECORDS), MAX_SHARDS)


def _read_plan(folder: Path) -> dict[str, Any] | None:
  path = folder / PLAN
  if not path.exists():
    return None
  plan = read_json(path, f"use another folder, or delete {folder}")
  if type(plan.get("shards")) is not int or plan["shards"] < 1:
    raise ValueError(
      f"{path} cannot be read (shards is {quote(plan.get('shards'))}): use another folder, or delete {folder}"
    )
  return plan


def _claim(folder: Path, plan: dict[str, Any]):
  """Writes the plan, or checks that the folder has the same plan; ValueError names the first field that differs."""
  begun = any(folder.glob("*.array_record"))  # before reading the plan, which another process may be writing
  if _read_plan(folder) is None:
    if begun:
      raise ValueError(f"{folder} has shards but no {PLAN}, which describes them: use another folder")
    files.write_new_file(folder / PLAN, (json.dumps(plan, indent=1) + "\n").encode())
  _check_plan(folder, plan)


def _check_plan(folder: Path, plan: dict[str, Any]):
  old, new = (flatten_dict(p, sep=".") for p in (_read_plan(folder) or {}, json.loads(json.dumps(plan))))
  for name in [*new, *(old.keys() - new.keys())]:
    if old.get(name) != new.get(name):
      raise ValueError(
        f"{folder} was begun with other settings: {name} is {quote(old.get(name))} there and {quote(new.get(name))} "
        "here; use another folder, or the same settings"
      )


class _MissingImages:
  """The images of the missing shards as one random-access sequence; each element also has the number of its shard."""

  def __init__(self, images: SplitImages, ranges: list[tuple[int, int, int]]):
    self._images, self._ranges = images, ranges  # (shard, first image, end)
    self._ends = np.cumsum([end - first for _, first, end in ranges])

  def __len__(self) -> int:
    return int(self._ends[-1]) if self._ranges else 0

  def __getitem__(self, index: int) -> dict[str, Any]:
    place = int(np.searchsorted(self._ends, index, side="right"))
    shard, _, end = self._ranges[place]
    return {"shard": shard, **self._images[end - int(self._ends[place]) + int(index)]}


class _Tally:
  """Counts images, and logs the unreadable ones."""

  def __init__(self, planned: int, max_unreadable: float):
    self.planned, self._max_unreadable = planned, max_unreadable
    self.skipped = self._run = self.unreadable = self.images = 0
    self._start = time.monotonic()

  def skip(self, images: int, unreadable: int):
    """Counts a shard that exists already."""
    self.skipped += images
    self.unreadable += unreadable

  def readable(self, elements: Iterable[dict[str, Any]], bar: Bar) -> Iterator[dict[str, Any]]:
    """Yields the readable elements, and shows by the bar how many images are done.

    Raises:
      ValueError: too many images (core/unreadable.py), or MAX_RUN consecutive ones, are unreadable.
    """
    for element in elements:
      self.images += 1
      if "unreadable" in element:
        self._count_unreadable(element["unreadable"])
      else:
        self._run = 0
        yield element
      bar(self.skipped + self.images)

  def _count_unreadable(self, reason: str):
    self._run += 1
    self.unreadable += 1
    unreadable.skip(reason)
    unreadable.check(self.unreadable, self.planned, self._max_unreadable, example=reason)
    if self._run >= MAX_RUN:
      raise ValueError(f"{self._run} consecutive images are unreadable, the last one is {reason}")

  def rate(self) -> float:
    """Returns images per second."""
    return self.images / max(time.monotonic() - self._start, 1e-9)


def _write_shard(path: Path, records: Iterable[bytes]):
  """Writes an ArrayRecord file under a temporary name, and renames it when all its records are on disk."""
  count = 0
  with files.replacing(path) as temporary:
    with _naming(path):
      writer = array_record_module.ArrayRecordWriter(str(temporary), _OPTIONS)
    for record in records:
      with _naming(path):
        writer.write(record)
      count += 1
    with _naming(path):
      writer.close()
      with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
      if (found := _count(temporary)) != count:
        raise OSError(f"{found} of {count} records can be read again")


@contextlib.contextmanager
def _naming(path: Path):
  """Turns errors of writing a file into a ValueError that names it."""
  try:
    yield
  except (RuntimeError, OSError) as e:  # array_record raises RuntimeError for everything
    raise ValueError(f"cannot write {path}: {' '.join(str(e).split())}") from e


def _count(path: Path, read: bool = True) -> int | None:
  """Returns the number of records of an ArrayRecord file; None if it is missing or damaged.

  Args:
    read: whether to read all of them (about 1 GB/s from memory); False: the file's own count.
  """
  if not path.is_file():
    return None
  try:
    reader = array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
    count = reader.num_records()
    for first in range(0, count if read else 0, _READ):
      reader.read(first, min(first + _READ, count))
    reader.close()
  except (RuntimeError, ValueError, IndexError):
    return None
  return count


def _finish(
  folder: Path,
  plan: dict[str, Any],
  records: Records,
  images: SplitImages,
  paths: list[Path],
  shapes: list[Shape | None],
  tally: _Tally,
) -> dict[str, Any] | None:
  """Writes meta.json if all shards exist, and returns it."""
  if tally.images:
    print(
      f"wrote {tally.images} images x {plan['copies']}, {tally.rate():.1f} images/s; unreadable: {tally.unreadable}",
      flush=True,
    )
  missing = sum(not path.is_file() for path in paths)
  if missing:
    print(
      f"{missing} shards are still missing: the process that finishes last writes {META}; rerun processes that stopped",
      flush=True,
    )
    return None
  _check_plan(folder, plan)
  counts = [_count(path, read=False) for path in paths]
  for path, count in zip(paths, counts):
    if count is None:
      raise ValueError(f"{path} is damaged: delete it, and rerun the process that wrote it")
  fields = ("format", "what", *records.shards.FIELDS, "num_images", "copies", "seed", "sources", *_CROPS, *_SHAPES)
  meta = {name: plan[name] for name in fields if name in plan} | {
    "num_records": sum(filter(None, counts)),
    "class_names": list(images.class_names) or None,
    "shard_records": counts,
    "shard_bytes": [path.stat().st_size for path in paths],
  }
  if None not in shapes:
    meta["shard_shapes"] = [list(shape) for shape in shapes if shape]
  files.write_file(folder / META, (json.dumps(meta, indent=1) + "\n").encode())
  model = f", fingerprint {plan['fingerprint']}" if "fingerprint" in plan else ""
  print(f"{folder}: {meta['num_records']} records in {len(paths)} shards of {plan['what']}{model}", flush=True)
  return meta
