"""Token shards: token ids of images, on which stage "ar" trains.

A record is the MessagePack array [ids (uint16, little endian, as bytes), length, label, num_objects, captions]; the
copies of an image are consecutive records. If crops have several shapes, the height and width of the crop are a list
after the length.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import os
from typing import Any

import grain
import jax
import numpy as np

from flextok_jax.data import pipeline
from flextok_jax.data.shards import files

MAX_IDS = 2**16  # a token id takes two bytes


class TokenShards(files.Shards):
  """Token ids: shards[i] -> {"ids" uint16 [n], "length", "label", "num_objects": int, "captions": list of str}.

  If crops have several shapes a record also has "size", the height and width of its crop.

  Attributes:
    meta: see files.Shards; also fingerprint: of the tokenizer; image_size; num_ids: vocabulary size; num_tokens: ids
      per record; quality, metric: of adaptive lengths, or None.
  """

  WHAT = "tokens"
  FIELDS = ("fingerprint", "image_size", "num_ids", "num_tokens", "quality", "metric")

  @classmethod
  def pack(cls, record: Mapping[str, Any]) -> bytes:
    size = [list(record["size"])] if "size" in record else []
    return files.pack([np.asarray(record["ids"]).astype("<u2").tobytes(), int(record["length"]), *size], record)

  def parse(self, data: bytes) -> dict[str, Any]:
    record, most = unpack(data), self.meta["num_tokens"]
    if len(record["ids"]) != most or record["ids"].max() >= self.meta["num_ids"] or not 1 <= record["length"] <= most:
      raise ValueError(f"its ids or their length do not match {files.META}")
    return record


def unpack(data: bytes) -> dict[str, Any]:
  """Returns the record of TokenShards.pack; ValueError for other bytes."""
  content, facts = files.unpack(data, "tokens")
  try:
    ids, length, *size = content
    record = {"ids": np.frombuffer(ids, "<u2").astype(np.uint16), "length": int(length), **facts}
    if len(size) > 1:
      raise ValueError(f"{len(content)} fields")
    return record | ({"size": files.shape_of("size", size[0], 2)} if size else {})
  except (ValueError, TypeError, OverflowError) as e:
    raise ValueError(f"not a record of tokens: {e}") from None


class TokenRecords(files.EncodedRecords):
  """Records of TokenShards: `encode` returns (ids int [b, num_tokens], lengths int [b] or None: all tokens).

  Args:
    tokenizer: settings of the tokenizer that affect the ids, with fingerprint, image_size, num_ids and num_tokens.
    quality, metric: the threshold and the distance that select the lengths; None: `encode` returns no lengths.
  """

  shards = TokenShards

  def __init__(
    self,
    encode: Callable,
    tokenizer: Mapping[str, Any],
    batch_size: int,
    quality: float | None = None,
    metric: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ):
    super().__init__(encode, {**tokenizer, "quality": quality, "metric": metric}, batch_size, mesh)
    if tokenizer["num_ids"] > MAX_IDS:
      raise ValueError(f"token shards store ids below {MAX_IDS}, but this tokenizer has {tokenizer['num_ids']}")
    self._num_tokens, self._num_ids = tokenizer["num_tokens"], tokenizer["num_ids"]

  def rows(self, elements: list[dict[str, Any]], encoded: Any) -> Iterator[bytes]:
    ids, lengths = encoded
    lengths = np.full(len(ids), self._num_tokens) if lengths is None else lengths
    if ids.shape[1] != self._num_tokens or ids.min() < 0 or ids.max() >= self._num_ids:
      raise ValueError(
        f"the tokenizer returned ids from {ids.min()} to {ids.max()} of shape {list(ids.shape)}: they must be from 0 "
        f"to {self._num_ids - 1}, {self._num_tokens} per image"
      )
    if lengths.min() < 1 or lengths.max() > self._num_tokens:
      raise ValueError(f"the lengths from {lengths.min()} to {lengths.max()} must be from 1 to {self._num_tokens}")
    for row, length, element in zip(ids, lengths, elements):
      yield TokenShards.pack({**element, "ids": row, "length": length})


@dataclasses.dataclass(frozen=True)
class TokenFormat:
  """The sequences that a generator trains on.

  Attributes:
    num_ids: vocabulary size.
    num_tokens: ids per sequence; shards may have more, because the first tokens of an image also describe it.
    stop: whether a sequence ends at its stored length; False: it has num_tokens ids.
    num_classes: number of labels; None: labels are not used.
    tokenizer: expected fingerprint of the tokenizer; "": any.
    captions: (encoder, max_length, path) of text.make_tokenizer; None: captions are not used.
  """

  num_ids: int
  num_tokens: int
  stop: bool
  num_classes: int | None
  tokenizer: str = ""
  captions: tuple[str, int, str] | None = None

  def check(self, meta: Mapping[str, Any]):
    """Raises ValueError if shards with this meta.json do not have such sequences."""
    if self.tokenizer and self.tokenizer != meta["fingerprint"]:
      raise ValueError(
        f"the token shards are of tokenizer {meta['fingerprint']}, but ar.tokenizer is {self.tokenizer}: write shards "
        "with that tokenizer (python -m flextok_jax.tokenize --config), or use the one that wrote these"
      )
    if meta["num_ids"] != self.num_ids:
      raise ValueError(
        f"the token shards have {meta['num_ids']} ids, but ar.num_ids is {self.num_ids}: set "
        f"ar.num_ids={meta['num_ids']}"
      )
    if meta["num_tokens"] < self.num_tokens:
      raise ValueError(
        f"the token shards have {meta['num_tokens']} tokens per image, but ar.num_tokens is {self.num_tokens}: set "
        f"ar.num_tokens={meta['num_tokens']} or less"
      )
    if self.stop and meta["quality"] is None:
      raise ValueError(
        "ar.stop needs the lengths of the sequences, which these token shards lack: write shards with "
        "python -m flextok_jax.tokenize --quality=..., or set ar.stop=False"
      )
    classes = len(meta["class_names"] or ())
    if self.num_classes is not None and classes > self.num_classes:
      raise ValueError(
        f"the token shards have {classes} classes, but ar.num_classes is {self.num_classes}: set "
        f"ar.num_classes={classes}"
      )

  def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns token_ids int32 [num_tokens], 0 past the length; length int32; label int32."""
    if self.num_classes is not None and record["label"] >= self.num_classes:
      raise ValueError(
        f"a record of the token shards has label {record['label']}, but ar.num_classes is {self.num_classes}: increase "
        "ar.num_classes"
      )
    length = min(record["length"], self.num_tokens) if self.stop else self.num_tokens
    token_ids = record["ids"][: self.num_tokens].astype(np.int32)
    token_ids[length:] = 0
    return {"token_ids": token_ids, "length": np.int32(length), "label": np.int32(record["label"])}


def open_tokens(folder: str | os.PathLike, split: str, token_format: TokenFormat) -> TokenShards:
  """Returns the token shards in a folder.

  Raises:
    FileNotFoundError, ValueError: the shards are missing, damaged or of another format.
  """
  if not folder:
    raise ValueError(
      "stage 'ar' trains on token shards: set data.tokens to a folder that python -m flextok_jax.tokenize --config=... "
      "wrote"
    )
  shards = TokenShards(folder, split)
  token_format.check(shards.meta)
  return shards


class _CaptionRow:
  """Caption -> {"text_ids" int32 [max_length], "text_lengths" int32}; {} if captions are not used."""

  def __init__(self, token_format: TokenFormat):
    self._tokenize = None
    if token_format.captions is not None:
      from flextok_jax.data import text  # late: only this condition needs it

      self._tokenize = text.make_tokenizer(*token_format.captions)

  def __call__(self, caption: str) -> dict[str, Any]:
    if self._tokenize is None:
      return {}
    ids, lengths = self._tokenize([caption])
    return {"text_ids": ids[0], "text_lengths": lengths[0]}


class _RandomRow(grain.transforms.RandomMap):
  """Record -> row of the batch with one of its captions; some rows lose their condition, for guidance."""

  def __init__(self, token_format: TokenFormat, drop_condition: float):
    self._format, self._caption_row, self._drop = token_format, _CaptionRow(token_format), drop_condition

  def random_map(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    captions = record["captions"] or [""]
    caption = captions[rng.integers(len(captions))]
    if rng.random() < self._drop:
      record, caption = {**record, "label": -1}, ""
    return {**self._format.row(record), **self._caption_row(caption), "unreadable": np.int32(0)}


def train_batches(
  records: TokenShards,
  token_format: TokenFormat,
  loading: pipeline.Loading,
  *,
  seed: int,
  drop_condition: float,
  **batching: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns an endless iterator over this process's rows of the global batches of tokens.

  As pipeline.train_batches, a pure function of (seed, step): every epoch is a new shuffle of all records. A batch of
  b = global_batch / process_count rows has int32 arrays: token_ids [b, num_tokens], 0 past length [b]; label [b], -1 if
  unknown; unreadable [b], always 0; if captions are used, text_ids [b, max_length] and text_lengths [b] of one of the
  captions.

  Args:
    drop_condition: share of the rows that get label -1 and the empty caption.
    **batching: global_batch, start_step, process_index, process_count of pipeline.local_batches.
  """
  shuffle_seed, caption_seed = pipeline.seeds(seed, "tokens")
  elements = grain.MapDataset.source(records).shuffle(seed=shuffle_seed).repeat()
  elements = elements.random_map(_RandomRow(token_format, drop_condition), seed=caption_seed)
  return pipeline.local_batches(elements, loading, by_batch=True, **batching)


def eval_arrays(records: TokenShards, token_format: TokenFormat, num_records: int) -> dict[str, Any]:
  """Returns copy 0 of the first num_records images in a fixed shuffled order; fewer if the shards have fewer images.

  The arrays are those of a batch of train_batches without "unreadable", and num_objects int32 [n]. captions is a list
  of the first caption of each image ("" if it has none), which text_ids are of.
  """
  if num_records < 1:
    raise ValueError(f"an evaluation needs at least one record, got num_records={num_records}")
  copies = records.meta["copies"]
  images = len(records) // copies
  order = grain.MapDataset.range(images).shuffle(seed=pipeline.EVAL_SHUFFLE_SEED)
  chosen = [records[order[i] * copies] for i in range(min(num_records, images))]
  captions = [(record["captions"] or [""])[0] for record in chosen]
  caption_row = _CaptionRow(token_format)
  rows = [token_format.row(record) | caption_row(caption) for record, caption in zip(chosen, captions)]
  return {
    **{name: np.stack([row[name] for row in rows]) for name in rows[0]},
    "captions": captions,
    "num_objects": np.array([record["num_objects"] for record in chosen], np.int32),
  }
