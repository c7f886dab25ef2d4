"""Trajectory shards: paths of a tokenizer's guided decoder from noise to latents, on which stage "distill" trains."""

from collections.abc import Callable, Iterator, Mapping
import os
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.data import pipeline
from flextok_jax.data.shards import files
from flextok_jax.data.shards.tokens import MAX_IDS

_REMEDY = "write shards with this teacher (python -m flextok_jax.tokenize --what=trajectories)"


class TrajectoryShards(files.Shards):
  """Paths: shards[i] -> {"ids" uint16 [n], "keep_k": int, "path" [m + 1, h, w, c], "label", "num_objects", "captions"}.

  A record is the MessagePack array [ids (uint16, little endian, as bytes), keep_k, path (little endian, as bytes),
  label, num_objects, captions]. Only the first keep_k ids count. A path has the states at the times 1, 1 - 1 / m, ...,
  0: the first is the noise. The lengths keep_k are stratified: `group_rows` consecutive records of a file are the rows
  of a group of nested.sample_keep_k.

  Attributes:
    meta: see files.Shards; also fingerprint: of the teacher (fingerprints.tokenizer with decoder=True); shape, dtype:
      of paths; num_ids: vocabulary size; num_tokens: ids per record; group_rows.
  """

  WHAT = "trajectories"
  FIELDS = ("fingerprint", "image_size", "shape", "dtype", "num_ids", "num_tokens", "group_rows")

  @classmethod
  def pack(cls, record: Mapping[str, Any]) -> bytes:
    ids, path = np.asarray(record["ids"]).astype("<u2"), np.asarray(record["path"])
    states = path.astype(path.dtype.newbyteorder("<")).tobytes()
    return files.pack([ids.tobytes(), int(record["keep_k"]), states], record)

  def parse(self, data: bytes) -> dict[str, Any]:
    content, facts = files.unpack(data, self.WHAT)
    try:
      ids, keep_k, states = content
      record: dict[str, Any] = {
        "ids": np.frombuffer(ids, "<u2").astype(np.uint16),
        "keep_k": int(keep_k),
        "path": np.frombuffer(states, jnp.dtype(self.meta["dtype"])).reshape(self.meta["shape"]),
      }
    except (ValueError, TypeError, OverflowError) as e:
      raise ValueError(f"not a record of {self.WHAT}: {e}") from None
    most = self.meta["num_tokens"]
    if len(record["ids"]) != most or record["ids"].max() >= self.meta["num_ids"] or not 1 <= record["keep_k"] <= most:
      raise ValueError(f"its ids or their number do not match {files.META}")
    return record | facts

  def strata(self, rows: int) -> list[np.ndarray]:
    """Returns the records that may be row 0, 1, ... of a group of `rows` rows, an array of indices each.

    `rows` divides group_rows: in a group of fewer rows, each has the lengths of several.
    """
    of_group = self.meta["group_rows"]
    places = np.concatenate([np.arange(count) % of_group for count in self.meta["shard_records"]])
    return [np.flatnonzero(places * rows // of_group == i) for i in range(rows)]


def open_trajectories(
  folder: str | os.PathLike, split: str = "train", *, fingerprint: str, intervals: int, global_batch: int, rows: int
) -> TrajectoryShards:
  """Returns the trajectory shards in a folder.

  Args:
    fingerprint: of the teacher with its sampler (weights/fingerprints.py).
    intervals: a number that divides the intervals of the paths.
    global_batch: rows per batch.
    rows: per group of a batch.

  Raises:
    FileNotFoundError, ValueError: the shards are missing, damaged or of another teacher, or do not fit.
  """
  shards = TrajectoryShards(folder, split)
  meta = shards.meta
  if fingerprint != meta["fingerprint"]:
    raise ValueError(
      f"the trajectory shards are of decoder {meta['fingerprint']}, but the teacher is {fingerprint}: {_REMEDY}"
    )
  if (meta["shape"][0] - 1) % intervals:
    raise ValueError(
      f"the trajectory shards have {meta['shape'][0] - 1} intervals per path, which distill.steps does not divide "
      f"(least common multiple {intervals}): {_REMEDY} and --config.distill.steps"
    )
  if meta["group_rows"] % rows:
    raise ValueError(
      f"the trajectory shards have groups of {meta['group_rows']} rows, which those of a batch of {global_batch} "
      f"({rows} rows) do not divide: set tokens.bucket_rows={meta['group_rows']} and data.global_batch to a multiple "
      "of it"
    )
  return shards


def _row(record: dict[str, Any]) -> dict[str, Any]:
  return {
    "token_ids": record["ids"].astype(np.int32),
    "keep_k": np.int32(record["keep_k"]),
    "path": record["path"],
    "label": np.int32(record["label"]),
    "num_objects": np.int32(record["num_objects"]),
    "unreadable": np.int32(0),
  }


def train_batches(
  records: TrajectoryShards, loading: pipeline.Loading, *, seed: int, rows: int, **batching: int
) -> Iterator[dict[str, np.ndarray]]:
  """Returns an endless iterator over this process's rows of the global batches of paths.

  As pipeline.train_batches, a pure function of (seed, step). Row i of each group is a record of its stratum
  (TrajectoryShards.strata), so lengths stay stratified; every stratum has a shuffle of its own. A batch of b =
  global_batch / process_count rows has token_ids int32 [b, n]; keep_k int32 [b]; path [b, m + 1, h, w, c] in its
  stored dtype; label, num_objects and unreadable (always 0) int32 [b].

  Args:
    rows: per group.
    **batching: global_batch, start_step, process_index, process_count of pipeline.local_batches.
  """
  strata = []
  for i, indices in enumerate(records.strata(rows)):
    shuffle_seed, _ = pipeline.seeds(seed, f"trajectories {i}")
    strata.append(grain.MapDataset.source(files.Subset(records, indices)).shuffle(seed=shuffle_seed).repeat())
  elements = grain.MapDataset.mix(strata).map(_row)  # in turn
  return pipeline.local_batches(elements, loading, by_batch=True, **batching)


class TrajectoryRecords(files.EncodedRecords):
  """Records of TrajectoryShards.

  `encode` gets {"image" uint8 [b, H, W, 3], "shard", "position" int32 [b]: of the record in its file}, and returns (ids
  [b, n], keep_k [b], path [b, m + 1, h, w, c]). Files begin with a whole group, and batch_size is a multiple of its
  rows, so batches consist of whole groups.
  """

  shards = TrajectoryShards

  def __init__(
    self, encode: Callable, settings: Mapping[str, Any], batch_size: int, mesh: jax.sharding.Mesh | None = None
  ):
    super().__init__(encode, settings, batch_size, mesh)
    if settings["num_ids"] > MAX_IDS:
      raise ValueError(f"trajectory shards store ids below {MAX_IDS}, but this tokenizer has {settings['num_ids']}")

  def inputs(self, crops: list[np.ndarray], elements: list[dict[str, Any]], first: int) -> dict[str, np.ndarray]:
    shard = np.full(len(crops), elements[0]["shard"], np.int32)
    position = np.arange(first, first + len(crops), dtype=np.int32)
    return {"image": np.stack(crops), "shard": shard, "position": position}

  def rows(self, elements: list[dict[str, Any]], encoded: Any) -> Iterator[bytes]:
    files.check_finite("paths", encoded[2])
    for ids, keep_k, path, element in zip(*encoded, elements):
      yield TrajectoryShards.pack({**element, "ids": ids, "keep_k": keep_k, "path": path})
