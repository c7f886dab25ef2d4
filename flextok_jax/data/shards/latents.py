"""Latent shards: moments of a VAE's posterior, on which stage "tokenizer" can train without the VAE's encoder."""

from collections.abc import Iterator, Sequence
import os
from typing import Any

import grain
import numpy as np

from flextok_jax.data import pipeline
from flextok_jax.data.shapes import Interleaved
from flextok_jax.data.shards.files import ArrayShards, Subset

_REMEDY = "write latents with that VAE (python -m flextok_jax.tokenize --what=latents), or use the VAE that wrote these"


class LatentShards(ArrayShards):
  """Moments: shards[i] -> {"moments" [h, w, 2 c], "label", "num_objects": int, "captions": list of str}.

  The moments are the mean and the log-variance, concatenated along the channels, before vae.scaling_factor. The copies
  of an image are consecutive records. If crops have several shapes, a record also has "size", the height and width of
  its crop in pixels.
  """

  WHAT, ARRAY = "latents", "moments"


def open_latents(
  folder: str | os.PathLike,
  split: str = "train",
  *,
  image_size: int,
  latent_channels: int,
  shapes: Sequence[tuple[int, int]] = (),
  fingerprint: str | None = None,
) -> LatentShards:
  """Returns the latent shards in a folder.

  Args:
    image_size, latent_channels: expected by the model.
    shapes: (height, width) of the images that the model is trained on; (): image_size twice.
    fingerprint: expected, of the VAE (weights/fingerprints.py); None: any.

  Raises:
    FileNotFoundError, ValueError: the shards are missing, damaged or of other images or another VAE.
  """
  shards = LatentShards(folder, split)
  meta = shards.meta
  if fingerprint is not None and fingerprint != meta["fingerprint"]:
    raise ValueError(f"the latent shards are of VAE {meta['fingerprint']}, but this VAE is {fingerprint}: {_REMEDY}")
  if meta["image_size"] != image_size:
    raise ValueError(
      f"the latent shards are of images of {meta['image_size']} px, but image_size is {image_size}: set "
      f"image_size={meta['image_size']}, or write new shards"
    )
  found, given = sorted(shards.by_shape()), {(height, width) for height, width in shapes}
  if not given.issuperset(found) or bool(found) != bool(given):
    text = ", ".join(f"({height}, {width})" for height, width in found)
    raise ValueError(
      f"the latent shards have images of the shapes {text}: set data.shapes=({text},)"
      if found
      else "the latent shards have images of one shape: set data.shapes=(), or write shards with these data.shapes"
    )
  if meta["shape"][-1] != 2 * latent_channels:
    channels, wanted = meta["shape"][-1] // 2, f"but vae.latent_channels is {latent_channels}"
    raise ValueError(f"the latent shards have {channels} channels, {wanted}: {_REMEDY}")
  return shards


def _row(record: dict[str, Any]) -> dict[str, Any]:
  teacher = {"teacher": record["teacher"]} if "teacher" in record else {}
  return {
    "latents": record["moments"],
    **teacher,
    "label": np.int32(record["label"]),
    "num_objects": np.int32(record["num_objects"]),
    "unreadable": np.int32(0),
  }


def train_batches(
  records: Any, loading: pipeline.Loading, *, seed: int, global_batch: int, **batching: int
) -> Iterator[dict[str, np.ndarray]]:
  """Returns an endless iterator over this process's rows of the global batches of latents.

  As pipeline.train_batches, a pure function of (seed, step): every epoch is a new shuffle of all records. A batch of
  b = global_batch / process_count rows has latents [b, h, w, 2 c], the moments in their stored dtype; with features
  also teacher [b, n, d] in its stored dtype; label, num_objects and unreadable (always 0) int32 [b]. If crops have
  several shapes, each batch has one; shapes take turns by the numbers of their records, each with its own shuffle.

  Args:
    records: LatentShards, or LatentsWithFeatures (features.py).
    **batching: start_step, process_index, process_count of pipeline.local_batches.
  """

  def endless(name: str, part: Any) -> grain.MapDataset:
    shuffle_seed, _ = pipeline.seeds(seed, name)
    return grain.MapDataset.source(part).shuffle(seed=shuffle_seed).repeat().map(_row)

  groups, elements = records.by_shape(), None
  if len(groups) > 1:
    parts = [endless(f"latents {shape}", Subset(records, indices)) for shape, indices in groups.items()]
    elements = Interleaved(parts, [len(indices) for indices in groups.values()], global_batch)
  else:
    elements = endless("latents", records)
  return pipeline.local_batches(elements, loading, by_batch=True, global_batch=global_batch, **batching)
