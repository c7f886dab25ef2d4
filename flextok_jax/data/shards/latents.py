"""Latent shards: what python -m flextok_jax.tokenize --what=latents writes, on which stage "tokenizer" can train.

The shards of data/shards/files.py. A record is the MessagePack array [moments (little endian, as bytes), label,
num_objects, captions]; the copies of an image stand together. The moments are those of the posterior of a VAE, before
config.vae.scaling_factor: its mean and its log-variance, one after the other along the channels.
"""

import grain
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.data import pipeline
from flextok_jax.data.shards import features as teacher_shards
from flextok_jax.data.shards import files as shard_files

WHAT = "latents"
DTYPES = ("float16", "bfloat16")  # of the moments
_OTHER = "write latents with that one (python -m flextok_jax.tokenize --what=latents), or use the one that wrote these"


def pack(record: dict) -> bytes:
  """Returns the bytes of a record: {"moments" [h, w, 2 c], "label", "num_objects": int, "captions": list of str}."""
  return shard_files.pack_array(record["moments"], record)


class Shards(shard_files.ArrayShards):
  """The records of a split at random access: shards[i] -> what pack takes.

  Attributes:
    meta: meta.json as a dict. fingerprint: of the VAE; dtype: of the moments; shape: theirs, [h, w, 2 c]; image_size;
      num_records; copies: records an image; class_names: list or None.

  Raises:
    FileNotFoundError, ValueError: as ShardFiles.
  """

  WHAT, NAME, KIND = WHAT, "moments", "latent"


def check_shards(meta: dict, config: ConfigDict, fingerprint: str | None = None):
  """Checks that latents suit config, of stage "tokenizer", and are of its VAE.

  Args:
    fingerprint: of the VAE at hand (weights/fingerprints.py); None: not at hand yet.

  Raises:
    ValueError: naming the field, both values and the remedy.
  """
  if fingerprint is not None and fingerprint != meta["fingerprint"]:
    raise ValueError(
      f"the latent shards are of VAE {meta['fingerprint']}, but the VAE at hand is {fingerprint}: {_OTHER}"
    )
  if config.vae.kind == "pixels":
    raise ValueError(
      "config.data.latents is of no use with vae.kind 'pixels', whose latents are the pictures: "
      "give --config.data.latents=''"
    )
  if meta["image_size"] != config.image_size:
    raise ValueError(
      f"the latent shards are of images of {meta['image_size']} px, but config.image_size is "
      f"{config.image_size}: give --config.image_size={meta['image_size']}, or write others"
    )
  if meta["shape"][-1] != 2 * config.vae.latent_channels:
    raise ValueError(
      f"the latent shards have {meta['shape'][-1] // 2} channels, but config.vae.latent_channels is "
      f"{config.vae.latent_channels}: {_OTHER}"
    )


def open_shards(config: ConfigDict, split: str) -> Shards:
  """Returns the shards of config.data.latents; FileNotFoundError or ValueError as Shards and check_shards."""
  records = Shards(config.data.latents, split)
  check_shards(records.meta, config)
  return records


def _row(record: dict) -> dict:
  teacher = {"teacher": record["teacher"]} if "teacher" in record else {}
  return {
    "latents": record["moments"],
    **teacher,
    "label": np.int32(record["label"]),
    "num_objects": np.int32(record["num_objects"]),
    "unreadable": np.int32(0),
  }


def train_batches(
  config: ConfigDict, *, start_step: int = 0, process_index: int = 0, process_count: int = 1, teacher_grid: int = 0
):
  """Returns an endless iterator over this process's rows of the global batches of config.data.latents.

  As pipeline.train_batches, a pure function of (config.seed, step): every epoch is a fresh shuffle of all records. A
  batch of b = global_batch / process_count rows: latents [b, h, w, 2 c], the moments in the type that they were stored
  in; label, num_objects, unreadable (which is 0) int32 [b].

  Args:
    teacher_grid: patches a side of the features that rows have beside, "teacher" [b, teacher_grid^2, d], of
      config.data.teacher (data/shards/features.py) and in the type that they were stored in; 0: none.

  Raises:
    FileNotFoundError, ValueError: no shards there, damaged ones, or such as do not suit the config.
  """
  shuffle_seed, _ = pipeline.seeds(config.seed, WHAT)
  records = open_shards(config, "train")
  if teacher_grid:
    teacher = teacher_shards.Shards(config.data.teacher)
    records = teacher_shards.Beside(records, teacher, config, teacher_grid)
  elements = grain.MapDataset.source(records).shuffle(seed=shuffle_seed).repeat().map(_row)
  return pipeline.local_batches(elements, config.data, start_step, process_index, process_count, by_batch=True)
