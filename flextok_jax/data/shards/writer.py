"""Writes shards (data/shards/files.py), so that a run that was killed goes on without a lost or a doubled record.

Shard s holds the images [s n / S, (s + 1) n / S) of one fixed sequence, and belongs to process s % process_count. It
gets its name when it is whole, so the folder itself says what is left to do. plan.json, written first, holds all that
the records depend on.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import itertools
import json
import os
from pathlib import Path
import time

from absl import logging
from array_record.python import array_record_module
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.core import files
from flextok_jax.data import pipeline
from flextok_jax.data.shards import contents as shard_contents
from flextok_jax.data.shards import files as shard_files
from flextok_jax.data.shards.split_images import Images
from flextok_jax.data.sources import registry as sources_lib

PLAN = "plan.json"
RECORDS = 4096  # of a shard by default,
MOST_SHARDS = 512  # unless these are more shards: a reader keeps all files open
_OPTIONS = "group_size:1,uncompressed"  # random access to single records, which are as good as random bytes
_REPORT_SECONDS = 10.0
_CROPS = ("crop", "crop_min_area", "flip")  # of config.data: what decides crops beside the sources


def write(
  folder: str | os.PathLike,
  config: ConfigDict,
  encode: Callable,
  tokenizer: dict,
  *,
  batch_size: int = 32,
  quality: float | None = None,
  metric: str | None = None,
  **options,
):
  """Writes token shards: write_shards of shard_contents.Tokens."""
  content = shard_contents.Tokens(encode, tokenizer, batch_size, quality, metric)
  return write_shards(folder, config, content, **options)


def write_shards(
  folder: str | os.PathLike,
  config: ConfigDict,
  content,
  *,
  split: str = "train",
  num_images: int | None = None,
  copies: int = 1,
  num_shards: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
):
  """Writes this process's shards of DIR/<split>/, those that are not there yet; the last to finish writes meta.json.

  Args:
    folder: DIR.
    config: its seed and its data say what is written.
    content: of data/shards/contents.py.
    num_images: default: all of a single source that has an end.
    copies: crops of each image, the first the centre crop; 1 of image files.
    num_shards: default: one for RECORDS records or so.

  Returns:
    meta.json as a dict, or None while shards of other processes are missing.

  Raises:
    ValueError: bad settings, other settings than those that the folder was begun with, too many unreadable images, or
      a folder that cannot be written.
  """
  for name, value in (("copies", copies), ("shards", num_shards), ("batch_size", content.batch_size)):
    if value is not None and value < 1:
      raise ValueError(f"--{name}={value} must be at least 1")
  folder = Path(folder) / split
  images = Images(config, split, content.image_size, num_images, copies)
  facts = {**content.plan, **content.describe(images)}
  if num_shards is None:
    num_shards = _planned_shards(folder) or _default_shards(len(images), copies, process_count)
  if num_shards > len(images):
    raise ValueError(f"--shards={num_shards} is more than the {len(images)} images")
  data = config.data
  plan = {
    "format": shard_files.FORMAT,
    "what": content.what,
    **facts,
    "split": split,
    "num_images": len(images),
    "copies": copies,
    "shards": num_shards,
    "seed": config.seed,
    "sizes": images.sizes,
    "sources": {name: data.sources[name].to_dict() for name in images.sizes},
  }
  if content.image_size is not None:
    plan |= {key: data[key] for key in _CROPS}
  _claim(folder, plan)

  bounds = [len(images) * s // num_shards for s in range(num_shards + 1)]
  paths = [folder / shard_files.shard_name(content.what, s, num_shards) for s in range(num_shards)]
  own = range(process_index, num_shards, process_count)
  planned = {s: bounds[s + 1] - bounds[s] for s in range(num_shards)}
  tally = _Tally(sum(planned[s] for s in own), data.max_unreadable)
  todo = []
  for s in own:
    found = _count(paths[s])
    if 0 < found <= planned[s] * copies and found % copies == 0:
      tally.skip(planned[s], planned[s] - found // copies)
    else:
      todo.append(s)
  if len(todo) < len(own):
    print(f"{len(own) - len(todo)} of {len(own)} shards are there already", flush=True)
  rows = _Todo(images, [(s, bounds[s], bounds[s + 1]) for s in todo])
  ready = pipeline.stream(rows, max(content.batch_size // copies, 1), data, drop_remainder=False, batch_fn=list)
  ready = itertools.chain.from_iterable(ready)
  for s, elements in itertools.groupby(ready, key=lambda element: element["shard"]):
    _write_shard(paths[s], content.records(tally.readable(elements)))
  return _finish(folder, plan, content, images, paths, tally)


def _default_shards(num_images: int, copies: int, process_count: int) -> int:
  number = min(-(-num_images * copies // RECORDS), MOST_SHARDS)
  return min(max(number, process_count), num_images)


def _read_plan(folder: Path) -> dict | None:
  path = folder / PLAN
  if not path.is_file():
    return None
  try:
    plan = json.loads(path.read_text())
    if not isinstance(plan["shards"], int):
      raise ValueError(f"shards is {plan['shards']!r}")
    return plan
  except (ValueError, TypeError, KeyError, RecursionError) as e:
    raise ValueError(f"{path} cannot be read ({e}): use another --out, or delete {folder}") from None


def _planned_shards(folder: Path) -> int | None:
  return (_read_plan(folder) or {}).get("shards")


def _claim(folder: Path, plan: dict):
  """Makes the folder that of a plan; ValueError where it is another's, naming the first field that differs."""
  begun = any(folder.glob("*.array_record"))  # before the plan, which another process may be writing
  old = _read_plan(folder)
  if old is None:
    if begun:
      raise ValueError(f"{folder} has shards but no {PLAN}, which says what they are: use another --out")
    files.write_file(folder / PLAN, (json.dumps(plan, indent=1) + "\n").encode())
    return
  old = {"what": "tokens", **old}  # the first kind that there was
  old, new = (flatten_dict(json.loads(json.dumps(p)), sep=".") for p in (old, plan))
  for name in [*new, *(old.keys() - new.keys())]:
    if old.get(name) != new.get(name):
      raise ValueError(
        f"{folder} was begun with other settings: {name} is {old.get(name)!r} there and "
        f"{new.get(name)!r} here; use another --out, or those settings"
      )


class _Todo:
  """The images of the shards left to do as one random-access sequence, each element with the number of its shard."""

  def __init__(self, images: Images, ranges: list[tuple[int, int, int]]):
    self._images, self._ranges = images, ranges
    self._ends = np.cumsum([end - first for _, first, end in ranges])

  def __len__(self) -> int:
    return int(self._ends[-1]) if self._ranges else 0

  def __getitem__(self, index: int) -> dict:
    place = int(np.searchsorted(self._ends, index, side="right"))
    shard, _, end = self._ranges[place]
    return {"shard": shard, **self._images[end - int(self._ends[place]) + int(index)]}


class _Tally:
  """Counts images, names the unreadable ones in the log, and reports progress."""

  def __init__(self, planned: int, max_unreadable: float):
    self._planned, self._most = planned, max_unreadable
    self._skipped = self._run = self.unreadable = self.images = 0
    self._begun = self._told = time.monotonic()

  def skip(self, images: int, unreadable: int):
    """Counts a shard that was there already."""
    self._skipped += images
    self.unreadable += unreadable

  def readable(self, elements: Iterable[dict]) -> Iterator[dict]:
    """Passes over what cannot be read.

    Raises:
      ValueError: a larger share than config.data.max_unreadable, or a long run, cannot be read.
    """
    for element in elements:
      self.images += 1
      self._run = self._run + 1 if "unreadable" in element else 0
      if "unreadable" in element:
        self.unreadable += 1
        logging.warning("Unreadable image passed over: %s", element["unreadable"])
        if self.unreadable > self._most * self._planned:
          raise ValueError(
            f"{self.unreadable} of {self._planned} images are unreadable, a larger share than "
            f"config.data.max_unreadable={self._most}; the last one is {element['unreadable']}"
          )
        if self._run >= sources_lib.MAX_RUN:
          raise ValueError(f"{self._run} images in a row are unreadable, the last one is {element['unreadable']}")
      else:
        yield element
      if time.monotonic() - self._told > _REPORT_SECONDS:
        self._told = time.monotonic()
        left = (self._planned - self._skipped - self.images) / self.rate()
        print(
          f"{self._skipped + self.images}/{self._planned} images  {self.rate():.1f} images/s  "
          f"ETA {int(left) // 3600}h{int(left) // 60 % 60:02d}m{int(left) % 60:02d}s",
          flush=True,
        )

  def rate(self) -> float:
    """Images a second."""
    return self.images / max(time.monotonic() - self._begun, 1e-9)


def _write_shard(path: Path, records: Iterable[bytes]):
  """Writes an ArrayRecord file under another name, and renames it when it is whole and on the disk."""
  temporary = path.with_name(f".{path.name}.tmp")  # without a process id: the rerun after a kill writes over it
  count = 0
  with _named(path):
    writer = array_record_module.ArrayRecordWriter(str(temporary), _OPTIONS)
  for record in records:
    with _named(path):
      writer.write(record)
    count += 1
  with _named(path):
    writer.close()
    with open(temporary, "rb+") as f:
      os.fsync(f.fileno())
    if _count(temporary) != count:
      raise OSError("it lacks records")
    os.replace(temporary, path)


@contextlib.contextmanager
def _named(path: Path):
  try:
    yield
  except (RuntimeError, OSError) as e:  # RuntimeError: array_record's of every kind
    raise ValueError(f"cannot write {path}: {' '.join(str(e).split())}") from e


def _count(path: Path) -> int:
  """The number of records of an ArrayRecord file, 0 of one that is missing or was cut short."""
  if not path.is_file():
    return 0
  try:
    reader = array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
    count = reader.num_records()
    reader.close()
  except RuntimeError:
    return 0
  return count


def _finish(folder: Path, plan: dict, content, images: Images, paths: list[Path], tally: _Tally) -> dict | None:
  missing = sum(not path.is_file() for path in paths)
  if tally.images:
    print(
      f"wrote {tally.images} images x {plan['copies']}, {tally.rate():.1f} images/s; unreadable: {tally.unreadable}",
      flush=True,
    )
  if missing:
    print(
      f"{missing} shards are still missing: the process that writes the last of them writes {shard_files.META}; "
      "rerun what was stopped",
      flush=True,
    )
    return None
  counts = [_count(path) for path in paths]
  meta = {key: plan[key] for key in ("format", "what", *content.meta, "num_images", "copies", "seed", "sources")}
  meta |= {key: plan[key] for key in _CROPS if key in plan}
  meta |= {
    "num_records": sum(counts),
    "class_names": list(images.class_names) or None,
    "shard_records": counts,
    "shard_bytes": [path.stat().st_size for path in paths],
  }
  files.write_file(folder / shard_files.META, (json.dumps(meta, indent=1) + "\n").encode())
  model = f", fingerprint {plan['fingerprint']}" if "fingerprint" in plan else ""
  print(f"{folder}: {meta['num_records']} records in {len(paths)} shards of {content.what}{model}", flush=True)
  return meta
