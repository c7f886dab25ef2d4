"""Token shards: what python -m flextok_jax.tokenize --config=… writes and stage "ar" trains on.

The shards of data/shards/files.py. A record is the MessagePack array [ids (uint16, little endian, as bytes), length,
label, num_objects, captions]; the copies of an image stand together.
"""

import functools

import grain
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.data import pipeline
from flextok_jax.data.shards import files as shard_files

MAX_IDS = 2**16  # a token id takes two bytes
WHAT = "tokens"
shard_name = functools.partial(shard_files.shard_name, WHAT)


def pack(record: dict) -> bytes:
  """Returns the bytes of a record: {"ids" int [n], "length", "label", "num_objects": int, "captions": list of str}."""
  return shard_files.pack([np.asarray(record["ids"]).astype("<u2").tobytes(), int(record["length"])], record)


def unpack(data: bytes) -> dict:
  """Returns the record of pack, ids as uint16 [n]; ValueError for other bytes."""
  content, facts = shard_files.unpack(data, "token")
  try:
    ids, length = content
    return {"ids": np.frombuffer(ids, "<u2").astype(np.uint16), "length": int(length), **facts}
  except (ValueError, TypeError) as e:
    raise ValueError(f"no token record: {e}") from None


class Shards(shard_files.ShardFiles):
  """The records of a split at random access: len(shards), and shards[i] -> what unpack returns.

  Attributes:
    meta: meta.json as a dict. fingerprint: of the tokenizer; num_ids: size of its vocabulary; num_tokens: ids a record;
      num_records; copies: records an image; class_names: list or None; quality, metric: of adaptive lengths, or None.

  Raises:
    FileNotFoundError, ValueError: as ShardFiles.
  """

  WHAT = WHAT
  FIELDS = ("fingerprint", "num_ids", "num_tokens", "quality", "metric")

  def parse(self, data: bytes) -> dict:
    record = unpack(data)
    if len(record["ids"]) != self.meta["num_tokens"] or record["ids"].max() >= self.meta["num_ids"]:
      raise ValueError(f"its ids do not fit {shard_files.META}")
    return record


def check_shards(meta: dict, config: ConfigDict, fingerprint: str | None = None):
  """Checks that shards suit config.ar, and that they are of its tokenizer.

  Shards of more tokens than config.ar.num_tokens are fine: the first ones of an image are a description of it, too.

  Args:
    fingerprint: of a tokenizer at hand, which must be theirs as well.

  Raises:
    ValueError: naming the field, both values and the remedy.
  """
  ar, here = config.ar, meta["fingerprint"]
  for what, wanted in (("config.ar.tokenizer", ar.tokenizer), ("the tokenizer at hand", fingerprint)):
    if wanted and wanted != here:
      raise ValueError(
        f"the token shards are of tokenizer {here}, but {what} is {wanted}: write shards with that "
        "tokenizer (python -m flextok_jax.tokenize --config), or use the one that wrote these"
      )
  if meta["num_ids"] != ar.num_ids:
    raise ValueError(
      f"the token shards have {meta['num_ids']} ids, but config.ar.num_ids is {ar.num_ids}: "
      f"give --config.ar.num_ids={meta['num_ids']}"
    )
  if meta["num_tokens"] < ar.num_tokens:
    raise ValueError(
      f"the token shards have {meta['num_tokens']} tokens an image, but config.ar.num_tokens is "
      f"{ar.num_tokens}: give --config.ar.num_tokens={meta['num_tokens']} or less"
    )
  if ar.stop and meta["quality"] is None:
    raise ValueError(
      "config.ar.stop needs the lengths of the sequences, which these token shards lack: write shards "
      "with python -m flextok_jax.tokenize --quality=…, or give --config.ar.stop=False"
    )
  classes = len(meta["class_names"] or ())
  if ar.condition == "class" and classes > ar.num_classes:
    raise ValueError(
      f"the token shards have {classes} classes, but config.ar.num_classes is {ar.num_classes}: "
      f"give --config.ar.num_classes={classes}"
    )


def open_shards(config: ConfigDict, split: str) -> Shards:
  """Returns the shards of config.data.tokens; FileNotFoundError or ValueError as Shards and check_shards."""
  if not config.data.tokens:
    raise ValueError(
      "stage 'ar' trains on token shards: give --config.data.tokens=DIR, a folder that "
      "python -m flextok_jax.tokenize --config wrote"
    )
  records = Shards(config.data.tokens, split)
  check_shards(records.meta, config)
  return records


class _Row:
  """(record, caption) -> row of the batch."""

  def __init__(self, config: ConfigDict):
    self._ar = config.ar
    self._tokenizer = None
    if config.ar.condition == "text":
      from flextok_jax.data import text  # late: only this condition needs it

      self._tokenizer = text.make_tokenizer(config.text)

  def __call__(self, record: dict, caption: str) -> dict:
    count = self._ar.num_tokens
    if self._ar.condition == "class" and record["label"] >= self._ar.num_classes:
      raise ValueError(
        f"a record of the token shards has label {record['label']}, but config.ar.num_classes is "
        f"{self._ar.num_classes}: raise --config.ar.num_classes"
      )
    row = {
      "token_ids": record["ids"][:count].astype(np.int32),
      "length": np.int32(min(record["length"], count) if self._ar.stop else count),
      "label": np.int32(record["label"]),
    }
    row["token_ids"][row["length"] :] = 0
    if self._tokenizer is not None:
      ids, lengths = self._tokenizer([caption])
      row |= {"text_ids": ids[0], "text_lengths": lengths[0]}
    return row


class _RandomRow(grain.transforms.RandomMap):
  """A record and one of its captions -> row of the batch; some rows lose their condition, for guidance."""

  def __init__(self, config: ConfigDict):
    self._row = _Row(config)
    self._drop = config.ar.drop_condition

  def random_map(self, record: dict, rng: np.random.Generator) -> dict:
    captions = record["captions"] or [""]
    caption = captions[rng.integers(len(captions))]
    if rng.random() < self._drop:
      record, caption = {**record, "label": -1}, ""
    return {**self._row(record, caption), "unreadable": np.int32(0)}


def train_batches(config: ConfigDict, *, start_step: int = 0, process_index: int = 0, process_count: int = 1):
  """Returns an endless iterator over this process's rows of the global batches of config.data.tokens.

  As pipeline.train_batches, a pure function of (config.seed, step): every epoch is a fresh shuffle of all records. A
  batch of b = global_batch / process_count rows, int32: token_ids [b, ar.num_tokens], 0 past length [b]; label [b], -1
  where unknown; with condition "text" text_ids [b, text.max_length] and text_lengths [b], of one of the captions;
  unreadable [b], which is 0. A share ar.drop_condition of the rows has label -1 and the empty caption.

  Raises:
    FileNotFoundError, ValueError: no shards there, damaged ones, or such as do not suit the config.
  """
  records = open_shards(config, "train")
  shuffle_seed, caption_seed = pipeline.seeds(config.seed, "tokens")
  elements = grain.MapDataset.source(records).shuffle(seed=shuffle_seed).repeat()
  elements = elements.random_map(_RandomRow(config), seed=caption_seed)
  return pipeline.local_batches(elements, config.data, start_step, process_index, process_count, by_batch=True)


def eval_arrays(config: ConfigDict, num_records: int, split: str = "validation") -> dict:
  """Returns the first num_records images of a split under a fixed shuffle, of each its copy 0; fewer if it is smaller.

  The arrays are those of a batch of train_batches without "unreadable", and num_objects int32 [n]; captions is a list
  of the first caption of each ("" where there is none), which is the one that text_ids holds.
  """
  if num_records < 1:
    raise ValueError(f"an evaluation needs at least one record, got {num_records}")
  records, row = open_shards(config, split), _Row(config)
  copies = records.meta["copies"]
  images = len(records) // copies
  order = grain.MapDataset.range(images).shuffle(seed=pipeline.EVAL_SHUFFLE_SEED)
  chosen = [records[order[i] * copies] for i in range(min(num_records, images))]
  captions = [(record["captions"] or [""])[0] for record in chosen]
  rows = [row(record, caption) for record, caption in zip(chosen, captions)]
  return {
    **{name: np.stack([r[name] for r in rows]) for name in rows[0]},
    "captions": captions,
    "num_objects": np.array([record["num_objects"] for record in chosen], np.int32),
  }
