"""Teacher shards: features of a teacher's patches, for REPA in training on latent shards of the same crops."""

from typing import Any

import numpy as np

from flextok_jax.core.literals import quote
from flextok_jax.data.shards.files import ArrayShards
from flextok_jax.data.shards.latents import LatentShards

_SAME = (
  *("image_size", "num_records", "num_images", "copies", "seed", "sources", "crop", "crop_min_area", "flip"),
  *("shapes", "shape_weights"),
)
_REMEDY = (
  "write both (python -m flextok_jax.tokenize --what=latents and --what=dino) with the same --config and --copies"
)


class FeatureShards(ArrayShards):
  """Features of patches: shards[i] -> {"features" [n, d], "label", "num_objects": int, "captions": list of str}.

  Patches are in row-major order; their grid is that of image_size in proportion to the crop. Shards written with the
  same settings and copies have the same crops in the same order, whatever they contain.

  Attributes:
    meta: see ArrayShards; also the name of the teacher.
  """

  WHAT, ARRAY = "dino", "features"
  FIELDS = (*ArrayShards.FIELDS, "teacher")


class LatentsWithFeatures:
  """The records of latent shards, each with the teacher's features of the same crop as "teacher" [grid * grid, width].

  Args:
    grid: patches per side that the run expects.
    width: of the features that the run expects.

  Raises:
    ValueError: the shards are not of the same crops, or the features have another size; when reading a record, its
      label or captions differ.
  """

  def __init__(self, latents: LatentShards, features: FeatureShards, *, grid: int, width: int):
    self._latents, self._features = latents, features
    for name in _SAME:
      found, expected = features.meta.get(name), latents.meta.get(name)
      if found != expected:
        raise ValueError(
          f"the teacher's features (data.teacher) are not of the images of the latents (data.latents): {name} is "
          f"{quote(found)} in the features and {quote(expected)} in the latents; {_REMEDY}"
        )
    found_count, found_width = features.meta["shape"][0], features.meta["shape"][-1]
    if found_width != width:
      raise ValueError(
        f"the teacher shards have features of width {found_width}, but repa.features is {width}: set "
        f"repa.features={found_width}, or write new shards"
      )
    if found_count != grid**2:
      raise ValueError(
        f"the teacher shards have {found_count} patches per image, but this run expects {grid} x {grid}: set "
        f"repa.grid={round(found_count**0.5)}, or write new shards"
      )

  def by_shape(self) -> dict[tuple[int, int], np.ndarray]:
    """See Shards."""
    return self._latents.by_shape()

  def __len__(self) -> int:
    return len(self._latents)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record, other = self._latents[index], self._features[index]
    for name in ("label", "num_objects", "captions", "size"):
      if record.get(name) != other.get(name):
        raise ValueError(
          f"record {index} has {name} {quote(record.get(name))} in {self._latents} and {quote(other.get(name))} in "
          f"{self._features}, so the shards are not of the same images; {_REMEDY}"
        )
    return {**record, "teacher": other["features"]}
