"""Shards: records at random access, in folders that python -m flextok_jax.tokenize --config=… writes.

A folder DIR/<split>/ holds ArrayRecord files and meta.json, which says what they are. What a record holds is a matter
of its kind: token ids (shards.py), latents of a VAE (latent_shards.py), features of a teacher (teacher_shards.py) or
image files (image_shards.py). data/shards/writer.py writes them.
"""

import dataclasses
import json
from pathlib import Path

import grain
import jax.numpy as jnp
import msgpack
import numpy as np

FORMAT = 1
META = "meta.json"
_RERUN = "rerun python -m flextok_jax.tokenize with the settings that wrote this folder, which writes what is missing"


def shard_name(what: str, index: int, count: int) -> str:
  return f"{what}-{index:05d}-of-{count:05d}.array_record"


def pack(content: list, record: dict) -> bytes:
  """Returns the bytes of a record: the MessagePack array of its content and its label, num_objects and captions."""
  facts = int(record["label"]), int(record["num_objects"]), list(record["captions"])
  return msgpack.packb([*content, *facts], unicode_errors="replace")  # lone surrogates


def pack_array(array: np.ndarray, record: dict) -> bytes:
  """Returns the bytes of a record whose content is an array, little endian: see ArrayShards."""
  array = np.asarray(array)
  return pack([array.astype(array.dtype.newbyteorder("<")).tobytes()], record)


def unpack(data: bytes, kind: str) -> tuple[list, dict]:
  """Returns (content, {"label", "num_objects": int, "captions": list of str}) of pack; ValueError for other bytes."""
  try:
    *content, label, num_objects, captions = msgpack.unpackb(data)
    return content, {
      "label": int(label),
      "num_objects": int(num_objects),
      "captions": [str(caption) for caption in captions],
    }
  except (ValueError, TypeError, msgpack.UnpackException) as e:
    raise ValueError(f"no {kind} record: {e}") from None


@dataclasses.dataclass(frozen=True)
class _File:
  """What array_record asks of a file whose number of records is known."""

  filename: str
  examples_in_shard: int
  skip: int = 0

  @property
  def take(self) -> int:
    return self.examples_in_shard


class ShardFiles:
  """The records of a split at random access: len(shards), and shards[i] -> what the kind's parse returns.

  A subclass has WHAT, the name of its kind in the plural, FIELDS, what meta.json must say of it beyond what it says of
  all, and parse(bytes) -> dict, which raises ValueError for what is no such record.

  Attributes:
    meta: meta.json as a dict. Of every kind it has num_records; copies: records an image; class_names: list or None.

  Raises:
    FileNotFoundError, ValueError: naming what is missing or damaged; when reading a record, ValueError.
  """

  WHAT = ""
  FIELDS = ()
  _COMMON = ("num_records", "copies", "class_names", "shard_records", "shard_bytes")

  def __init__(self, folder: str, split: str = "train"):
    self._folder = Path(folder) / split
    self._name = f"{self.WHAT.removesuffix('s')} shards"
    if not folder or not self._folder.is_dir():
      there = sorted(p.parent.name for p in Path(folder).glob(f"*/{META}")) if folder else []
      found = f"it has {', '.join(there)}" if there else "no split at all is there"
      what = "" if self.WHAT == "tokens" else f" --what={self.WHAT}"
      checkpoint = "" if self.WHAT in ("images", "dino") else " --checkpoint=PATH"
      raise FileNotFoundError(
        f"no {self._name} of split {split!r} in {folder!r} ({found}): write them with python -m flextok_jax.tokenize"
        f"{what} --config=FILE{checkpoint} --out={folder or 'DIR'} --split={split}"
      )
    self.meta = self._read_meta()
    counts, sizes = self.meta["shard_records"], self.meta["shard_bytes"]
    self._paths = [self._folder / shard_name(self.WHAT, i, len(counts)) for i in range(len(counts))]
    for path, size in zip(self._paths, sizes):
      if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {_RERUN}")
      if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}: delete it and {_RERUN}")
    self._records = grain.sources.ArrayRecordDataSource([_File(str(p), n) for p, n in zip(self._paths, counts)])
    self._ends = np.cumsum(counts)

  def parse(self, data: bytes) -> dict:
    raise NotImplementedError

  def _read_meta(self) -> dict:
    path = self._folder / META
    if not path.is_file():
      raise FileNotFoundError(f"{path} is missing, so these {self._name} are not complete: {_RERUN}")
    try:
      meta = json.loads(path.read_text())
      if meta["format"] != FORMAT:
        raise ValueError(f"its format is {meta['format']!r}, this program reads {FORMAT}")
      meta.setdefault("what", "tokens")  # the first kind that there was
      if meta["what"] != self.WHAT:
        raise ValueError(f"it describes {meta['what']!r}")
      missing = [name for name in (*self._COMMON, *self.FIELDS) if name not in meta]
      if missing:
        raise ValueError(f"it has no {missing[0]!r}")
      if not len(meta["shard_records"]) == len(meta["shard_bytes"]) > 0:
        raise ValueError("its numbers of records and of bytes do not match")
      if not sum(meta["shard_records"]) == meta["num_records"] > 0:
        raise ValueError(f"its num_records {meta['num_records']!r} is not that of its shards")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
      raise ValueError(f"{path} is no description of {self._name} ({e}): delete it and {_RERUN}") from None
    return meta

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    try:
      return self.parse(self._records[index])
    except (ValueError, RuntimeError) as e:  # RuntimeError: array_record's of every kind of damage
      path = self._paths[int(np.searchsorted(self._ends, index, side="right"))]
      reason = " ".join(str(e).split())
      raise ValueError(f"{path}: record {index} cannot be read ({reason}): delete the file and {_RERUN}") from e

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self._folder})"


class ArrayShards(ShardFiles):
  """Records of an array each, all of one shape and type: shards[i] -> {NAME: array, and the facts of unpack}.

  A subclass has NAME, and KIND, what a record is called. meta.json has the array's dtype and shape, and also the
  fingerprint of the model that made it and the image_size.
  """

  NAME = KIND = ""
  FIELDS = ("fingerprint", "dtype", "shape", "image_size")

  def parse(self, data: bytes) -> dict:
    content, facts = unpack(data, self.KIND)
    if len(content) != 1 or not isinstance(content[0], bytes):
      raise ValueError(f"no {self.KIND} record")
    array = np.frombuffer(content[0], jnp.dtype(self.meta["dtype"]))
    return {self.NAME: array.reshape(self.meta["shape"]), **facts}
