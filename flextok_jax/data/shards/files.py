"""The format of shards: folders of records at random access that python -m flextok_jax.tokenize --config=... writes.

A folder DIR/<split>/ has ArrayRecord files and meta.json, which describes them. The kinds of records are token ids
(tokens.py), latents of a VAE (latents.py), features of a teacher (features.py), paths of a decoder (trajectories.py)
and image files (images.py). A subclass of Shards reads a kind, and a subclass of Records makes its records from images,
for writer.py.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from flextok_jax.config.ranges import MAX_SIDE
from flextok_jax.core.errors import first_line
from flextok_jax.core.literals import quote
from flextok_jax.data.sources.base import Source
from flextok_jax.parallel import batching

FORMAT = 1
META = "meta.json"
DTYPES = ("float16", "bfloat16")  # of stored arrays
MAX_JSON = 2**28  # bytes of meta.json or plan.json
_RERUN = "rerun python -m flextok_jax.tokenize with the settings that wrote this folder; it writes only what is missing"


def shard_name(what: str, index: int, count: int) -> str:
  """Returns the file name of a shard."""
  return f"{what}-{index:05d}-of-{count:05d}.array_record"


def pack(content: list, record: Mapping[str, Any]) -> bytes:
  """Returns a record as bytes: the MessagePack array [*content, label, num_objects, captions]."""
  facts = int(record["label"]), int(record["num_objects"]), list(record["captions"])
  return msgpack.packb([*content, *facts], unicode_errors="replace")  # lone surrogates


def shape_of(name: str, value: Any, rank: int) -> tuple[int, ...]:
  """Returns a list of numbers of a record as the shape that it states; ValueError if it is none of this rank."""
  if not _counts(value) or len(value) != rank or min(value) < 1:
    raise ValueError(f"{name} {quote(value)} is not a shape of {rank} numbers")
  return tuple(value)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
  """Returns the JSON object in a file; ValueError if there is none."""
  try:
    if path.stat().st_size > MAX_JSON or not path.is_file():
      raise ValueError(f"no file of at most {MAX_JSON} bytes")
    fields = json.loads(path.read_bytes())
    if not isinstance(fields, dict):
      raise ValueError(f"{quote(fields)} is not an object")
  except (ValueError, OSError, RecursionError) as e:
    raise ValueError(f"{path} cannot be read ({first_line(e, 200)}): {remedy}") from None
  return fields


def unpack(data: bytes, what: str) -> tuple[list, dict[str, Any]]:
  """Returns (content, {"label", "num_objects": int, "captions": list of str}); ValueError for bytes not from pack."""
  try:
    *content, label, num_objects, captions = msgpack.unpackb(data)
  except (ValueError, TypeError, msgpack.UnpackException) as e:
    raise ValueError(f"not a record of {what}: {first_line(e, 200)}") from None
  for name, value in (("label", label), ("num_objects", num_objects)):
    if type(value) is not int or not -1 <= value < 2**31:
      raise ValueError(f"not a record of {what}: {name} is {quote(value)}")
  if not _is_list(captions, str):
    raise ValueError(f"not a record of {what}: captions are {quote(captions)}")
  return content, dict(label=label, num_objects=num_objects, captions=captions)


def unpack_bytes(data: bytes, what: str) -> tuple[bytes, dict[str, Any]]:
  """As unpack, for a content of a single string of bytes."""
  content, facts = unpack(data, what)
  if len(content) != 1 or not isinstance(content[0], bytes):
    raise ValueError(f"not a record of {what}")
  return content[0], facts


def _is_list(value: Any, kind: type) -> bool:
  return type(value) is list and all(type(item) is kind for item in value)


def _count(value: Any) -> bool:
  return type(value) is int and 0 < value < 2**63


def _counts(value: Any) -> bool:
  return _is_list(value, int) and len(value) > 0 and min(value) >= 0 and sum(value) < 2**63


def _shapes(value: Any) -> bool:
  return type(value) is list and all(_counts(x) and len(x) == 2 and 0 < min(x) <= max(x) <= MAX_SIDE for x in value)


_is_text = lambda value: type(value) is str and len(value) <= 200
_is_bool = lambda value: type(value) is bool
_CHECKS: dict[str, Callable[[Any], bool]] = {  # of the fields of meta.json
  **dict.fromkeys(("num_records", "copies", "image_size", "num_ids", "num_tokens", "group_rows"), _count),
  "class_names": lambda value: value is None or _is_list(value, str),
  "shard_records": _counts,
  "shard_bytes": _counts,
  "fingerprint": _is_text,
  "teacher": _is_text,
  "dtype": lambda value: value in DTYPES,
  "shape": lambda value: _counts(value) and min(value) > 0,
  "quality": lambda value: value is None or type(value) in (int, float),
  "metric": lambda value: value is None or type(value) is str,
  "shard_shapes": _shapes,
  "framed": _is_bool,
  "flip": _is_bool,
}


@dataclasses.dataclass(frozen=True)
class _FileInstruction:
  """A whole file with a known number of records, in array_record's protocol."""

  filename: str
  examples_in_shard: int
  skip: int = 0

  @property
  def take(self) -> int:
    return self.examples_in_shard


class Shards:
  """The records of a split at random access: len(shards), shards[i] -> dict.

  A subclass has WHAT, the name of its kind in the plural; FIELDS, the fields of meta.json of this kind; and parse.

  Attributes:
    meta: meta.json as a dict. All kinds have num_records; copies: records per image; class_names: list or None; and,
      if crops have several shapes, shard_shapes: [height, width] of the crops of each file.

  Raises:
    FileNotFoundError, ValueError: a file is missing or damaged; ValueError when reading a damaged record.
  """

  WHAT: ClassVar[str] = ""
  FIELDS: ClassVar[tuple[str, ...]] = ()
  _COMMON = ("num_records", "copies", "class_names", "shard_records", "shard_bytes")

  def __init__(self, folder: str | os.PathLike, split: str = "train"):
    self._folder = Path(folder) / split
    self._name = f"{self.WHAT.removesuffix('s')} shards"
    if not os.fspath(folder) or not self._folder.is_dir():
      splits = sorted(p.parent.name for p in Path(folder).glob(f"*/{META}")) if os.fspath(folder) else []
      found = f"it has {', '.join(splits)}" if splits else "it has no split"
      what = "" if self.WHAT == "tokens" else f" --what={self.WHAT}"
      checkpoint = "" if self.WHAT in ("images", "dino") else " --checkpoint=PATH"
      raise FileNotFoundError(
        f"no {self._name} of split {split!r} in {os.fspath(folder)!r} ({found}): write them with "
        f"python -m flextok_jax.tokenize{what} --config=FILE{checkpoint} --out={folder or 'DIR'} --split={split}"
      )
    self.meta = self._read_meta()
    counts, sizes = self.meta["shard_records"], self.meta["shard_bytes"]
    self._paths = [self._folder / shard_name(self.WHAT, i, len(counts)) for i in range(len(counts))]
    for path, size in zip(self._paths, sizes):
      if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {_RERUN}")
      if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}: delete it and {_RERUN}")
    files = [_FileInstruction(str(path), count) for path, count in zip(self._paths, counts)]
    self._records = grain.sources.ArrayRecordDataSource(files)
    self._ends = np.cumsum(counts)

  @classmethod
  def pack(cls, record: Mapping[str, Any]) -> bytes:
    """Returns a record as bytes, the inverse of parse."""
    raise NotImplementedError

  def parse(self, data: bytes) -> dict[str, Any]:
    """Returns the record of its bytes; ValueError for other bytes."""
    raise NotImplementedError

  def _read_meta(self) -> dict[str, Any]:
    path = self._folder / META
    if not path.exists():
      raise FileNotFoundError(f"{path} is missing, so these {self._name} are not complete: {_RERUN}")
    remedy = f"delete it and {_RERUN}"
    meta = read_json(path, remedy)
    expected = {"format": FORMAT, "what": self.WHAT}
    for name in (*expected, *self._COMMON, *self.FIELDS):
      if name not in meta or (meta[name] != expected[name] if name in expected else not _CHECKS[name](meta[name])):
        found = f"{name} is {quote(meta[name])}" if name in meta else f"it has no {name!r}"
        raise ValueError(f"{path} does not describe {self._name} ({found}): {remedy}")
    shapes = meta.get("shard_shapes", [])
    if not _shapes(shapes) or len(shapes) not in (0, len(meta["shard_records"])):
      raise ValueError(f"{path} does not describe {self._name} (shard_shapes is {quote(shapes)}): {remedy}")
    if len(meta["shard_records"]) != len(meta["shard_bytes"]) or sum(meta["shard_records"]) != meta["num_records"]:
      raise ValueError(
        f"{path} does not describe {self._name} (shard_records do not match num_records or shard_bytes): {remedy}"
      )
    return meta

  def by_shape(self) -> dict[tuple[int, int], np.ndarray]:
    """Returns {(height, width) of the crops: indices of their records}; {} if all have one shape."""
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    for (height, width), count, end in zip(self.meta.get("shard_shapes", []), self.meta["shard_records"], self._ends):
      found.setdefault((height, width), []).append(np.arange(end - count, end))
    return {shape: np.concatenate(parts) for shape, parts in found.items() if sum(map(len, parts))}

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    shard = int(np.searchsorted(self._ends, index, side="right"))
    try:
      record = self.parse(self._records[index])
      shapes = self.meta.get("shard_shapes")
      if shapes and record.get("size") != tuple(shapes[shard]):
        raise ValueError(f"its size is {quote(record.get('size'))}, that of its file {quote(shapes[shard])}")
      return record
    except (ValueError, RuntimeError, IndexError) as e:  # array_record raises RuntimeError for damage
      path = self._paths[shard]
      reason = " ".join(str(e).split())[:200]
      raise ValueError(f"{path}: record {index} cannot be read ({reason}): delete the file and {_RERUN}") from e

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self._folder})"


class Subset:
  """Some records of a random-access sequence."""

  def __init__(self, records: Any, indices: np.ndarray):
    self._records, self._indices = records, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._records[int(self._indices[i])]


class ArrayShards(Shards):
  """Records of one array each, all of the same dtype: shards[i] -> {ARRAY: array, label, ...}.

  A record is the MessagePack array [array (little endian, as bytes), label, num_objects, captions]. A subclass has
  ARRAY, the array's name. meta.json also has the array's dtype and shape, the fingerprint of the model that computed
  it, and image_size. If crops have several shapes, a record has two lists after the array: its shape, and "size", the
  height and width of the crop; the shape in meta.json is then that at image_size.
  """

  ARRAY: ClassVar[str] = ""
  FIELDS: ClassVar[tuple[str, ...]] = ("fingerprint", "image_size", "shape", "dtype")

  @classmethod
  def pack(cls, record: Mapping[str, Any]) -> bytes:
    array = np.asarray(record[cls.ARRAY])
    shapes = [list(array.shape), list(record["size"])] if "size" in record else []
    return pack([array.astype(array.dtype.newbyteorder("<")).tobytes(), *shapes], record)

  def parse(self, data: bytes) -> dict[str, Any]:
    shape, dtype = self.meta["shape"], jnp.dtype(self.meta["dtype"])
    if "shard_shapes" not in self.meta:
      content, facts = unpack_bytes(data, self.WHAT)
      return {self.ARRAY: np.frombuffer(content, dtype).reshape(shape), **facts}
    parts, facts = unpack(data, self.WHAT)
    if len(parts) != 3 or not isinstance(parts[0], bytes):
      raise ValueError(f"not a record of {self.WHAT} with its shape")
    array = np.frombuffer(parts[0], dtype).reshape(shape_of("shape", parts[1], len(shape)))
    return {self.ARRAY: array, "size": shape_of("size", parts[2], 2), **facts}


class Records:
  """Makes the records of one kind of shards from images, for writer.write_shards.

  Attributes:
    shards: the reader of these records.
    image_size: height and width of the crops to encode, pixels; None: image files as they are stored.
    batch_size: images per batch.
  """

  shards: type[Shards]
  image_size: int | None
  batch_size: int

  def settings(self, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Returns everything but the images that affects the records, with all of shards.FIELDS, as JSON values."""
    raise NotImplementedError

  def records(self, elements: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Yields the records, in order, of readable elements of split_images.SplitImages."""
    raise NotImplementedError


class EncodedRecords(Records):
  """Records of crops that a model encodes.

  Args:
    encode: images uint8 [batch_size, h, w, 3] -> tree of arrays [batch_size, ...], see `rows`.
    settings: see Records.settings; has image_size.
    mesh: devices that the images of a batch are split over; None: `encode` gets numpy arrays.
  """

  def __init__(
    self, encode: Callable, settings: Mapping[str, Any], batch_size: int, mesh: jax.sharding.Mesh | None = None
  ):
    self.image_size, self.batch_size = settings["image_size"], batch_size
    self._encode, self._settings, self._mesh = encode, dict(settings), mesh

  def settings(self, sources: Mapping[str, Source]) -> dict[str, Any]:
    return self._settings

  def records(self, elements: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    crops = ((crop, element) for element in elements for crop in element["crops"])
    waiting: deque[list[dict]] = deque()  # elements of the batches that are being encoded

    def batches() -> Iterator[Any]:
      for first in itertools.count(0, self.batch_size):
        batch = list(itertools.islice(crops, self.batch_size))
        if not batch:
          return
        waiting.append([element for _, element in batch])
        yield self.inputs([crop for crop, _ in batch], waiting[-1], first)

    for encoded in batching.map_batches(self._encode, batches(), self.batch_size, self._mesh):
      yield from self.rows(waiting.popleft(), encoded)

  def inputs(self, crops: list[np.ndarray], elements: list[dict[str, Any]], first: int) -> Any:
    """Returns what `encode` gets for the crops of elements, of which the file has `first` before: the crops."""
    return np.stack(crops)

  def rows(self, elements: list[dict[str, Any]], encoded: Any) -> Iterator[bytes]:
    """Yields the records of elements; encoded is the result of `encode` for their crops, numpy arrays [n, ...]."""
    raise NotImplementedError


def check_finite(name: str, array: np.ndarray):
  """Raises ValueError if an array to be stored has infinite values or NaN."""
  if not np.isfinite(array.astype(jnp.float32)).all():
    raise ValueError(
      f"some {name} are not finite in {array.dtype}: use dtype bfloat16, or check the model that computes them"
    )


class ArrayRecords(EncodedRecords):
  """Records of ArrayShards: `encode` returns one array [batch_size, *shape].

  Args:
    shards: the kind of shards.
    settings: has "shape" and "dtype" of the array, and all other of shards.FIELDS.
  """

  shards: type[ArrayShards]

  def __init__(
    self,
    shards: type[ArrayShards],
    encode: Callable,
    settings: Mapping[str, Any],
    batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
  ):
    super().__init__(encode, settings, batch_size, mesh)
    self.shards = shards

  def rows(self, elements: list[dict[str, Any]], encoded: np.ndarray) -> Iterator[bytes]:
    name, shape, dtype = self.shards.ARRAY, list(encoded.shape[1:]), str(encoded.dtype)
    wanted = self._settings["shape"]
    if "size" in elements[0]:  # any of this rank
      wanted = [*shape[:-1], wanted[-1]] if len(shape) == len(wanted) else wanted
    if shape != wanted or dtype != self._settings["dtype"]:
      raise ValueError(f"{name} are {dtype} {shape}, not {self._settings['dtype']} {self._settings['shape']}")
    check_finite(name, encoded)
    for row, element in zip(encoded, elements):
      yield self.shards.pack({**element, name: row})
