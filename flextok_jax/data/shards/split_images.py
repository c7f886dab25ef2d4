"""The images of a split in a fixed order, as shards store them."""

import sys
from typing import Any

import grain
import numpy as np

from flextok_jax.data import pipeline, transforms
from flextok_jax.data.shards.images import file_bytes
from flextok_jax.data.sources import base


class SplitImages:
  """The images of a split in a fixed order: len(images), images[i] -> dict.

  One source: its records in order. Several sources: their mixture by weight, as in training. An element has label,
  num_objects and captions, and "crops" uint8 [copies, image_size, image_size, 3]: the centre crop, then crops drawn as
  in training, each from (seed, i, copy) alone. Without an image_size it has "data", the bytes of an image file, instead
  of crops. An element that cannot be read has only "unreadable", the reason.

  Args:
    image_size: height and width of the crops, pixels; None: image files as they are stored.
    num_images: None: all of a single source that is not endless.
    copies: crops per image.

  Attributes:
    class_names: of the labels, () if they have no names. In a mixture, labels number the classes of all sources one
      after another, and labels without names become -1.
    sizes: {kind of source: number of its records}.
    sources: {kind of source: source}.

  Raises:
    FileNotFoundError, ValueError: a source cannot be opened, or an argument is out of range.
  """

  def __init__(
    self,
    data: pipeline.ImageData,
    split: str,
    *,
    seed: int,
    image_size: int | None,
    num_images: int | None = None,
    copies: int = 1,
  ):
    self.sources = data.open(split)
    self.sizes = {kind: len(source) for kind, source in self.sources.items()}
    self._seed, self._size, self._copies = seed, image_size, copies
    self._augment = {}
    if image_size is not None:
      self._augment = {kind: pipeline.Augment(data, source, image_size) for kind, source in self.sources.items()}
    if copies > 1 and not any(augment.varies for augment in self._augment.values()):
      raise ValueError(
        f"copies={copies} would be equal, because nothing augments {', '.join(self.sizes)}: use copies=1, or see crop "
        "and flip"
      )
    self._len = self._count(num_images)
    self._first_label: dict[str, int] = {}
    self.class_names: tuple[str, ...] = ()
    for kind, source in self.sources.items():
      self._first_label[kind] = len(self.class_names)
      self.class_names += tuple(source.class_names)
    self._order = pipeline.mix(
      {
        kind: grain.MapDataset.range(size)
        .shuffle(seed=pipeline.seeds(seed, kind)[0])
        .repeat()
        .map(lambda index, kind=kind: (kind, index))
        for kind, size in self.sizes.items()
      },
      {kind: data.sources[kind]["weight"] for kind in self.sizes},
    )

  def _count(self, num_images: int | None) -> int:
    single, size = len(self.sizes) == 1, sum(self.sizes.values())
    endless = [kind for kind, size in self.sizes.items() if size >= base.ENDLESS]
    if num_images is None:
      if endless or not single:
        what = f"source {endless[0]!r}" if endless else f"a mixture ({', '.join(self.sizes)})"
        raise ValueError(f"{what} is endless: set num_images")
      return size
    if not 1 <= num_images <= (size if single else sys.maxsize):
      raise ValueError(f"num_images={num_images} is out of range: {', '.join(self.sizes)} has 1 to {size} images")
    return num_images

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, i: int) -> dict[str, Any]:
    element: Any = self._order[i] if len(self.sources) > 1 else (*self.sources, i)
    kind, index = element
    decode = file_bytes if self._size is None else transforms.to_rgb
    try:
      record = base.view(self.sources[kind], int(index), decode)
    except base.UnreadableRecord as error:
      return {"unreadable": str(error)}
    captions = record.get("captions") or (record["caption"],)
    facts = {
      "label": self._label(kind, int(record["label"])),
      "captions": [caption for caption in captions if caption],
      "num_objects": int(record["num_objects"]),
    }
    if self._size is None:
      return {"data": record["image"], **facts}
    picture, augment = record["image"], self._augment[kind]
    crops = [transforms.center_crop(picture, self._size)]
    crops += [augment(picture, np.random.default_rng([self._seed, i, copy])) for copy in range(1, self._copies)]
    return {"crops": np.stack(crops), **facts}

  def _label(self, kind: str, label: int) -> int:
    if len(self.sources) == 1:
      return label
    return self._first_label[kind] + label if 0 <= label < len(self.sources[kind].class_names) else -1
