"""The images of a split in a fixed order, as shards hold them."""

import sys

import grain
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.data import pipeline, transforms
from flextok_jax.data.shards import images as image_shards
from flextok_jax.data.sources import draws
from flextok_jax.data.sources import registry as sources_lib


class Images:
  """The images of a split in a fixed order: len(images), and images[i] as a dict.

  One source: its records in order. Several: their mixture by weight, as in training. An element has "crops" uint8
  [copies, s, s, 3], the first the centre crop and the others drawn as in training, each by (seed, i, copy) alone, or
  without an image_size "data", the bytes of an image file as it is stored; and label, num_objects, captions. An element
  that cannot be read has "unreadable", which says why, instead.

  Attributes:
    class_names: of the labels, or () where they have no names. In a mixture the classes of all sources follow one
      another, and labels without names become -1.
    sizes: {name of a source: number of its records}.
    sources: {name: source}.

  Raises:
    ValueError: settings that make no sense.
  """

  def __init__(self, config: ConfigDict, split: str, image_size: int | None, num_images: int | None, copies: int):
    data = config.data
    self.sources = pipeline.open_sources(data, split)
    self._seed, self._size, self._copies = config.seed, image_size, copies
    self._augment = {}
    if image_size is not None:
      self._augment = {name: pipeline.Augment(data, source, image_size) for name, source in self.sources.items()}
    self.sizes = {name: len(source) for name, source in self.sources.items()}
    if copies > 1 and not any(augment.varies for augment in self._augment.values()):
      raise ValueError(
        f"--copies={copies} would be equal, as nothing augments {', '.join(self.sizes)} here: give "
        "--copies=1, or see config.data.crop and config.data.flip"
      )
    endless = [name for name, size in self.sizes.items() if size >= draws.LENGTH]
    if num_images is None and (endless or len(self.sizes) > 1):
      what = f"source {endless[0]!r}" if endless else f"a mixture ({', '.join(self.sizes)})"
      raise ValueError(f"{what} has no end: give --num_images=N")
    size = sum(self.sizes.values())
    if num_images is not None and not 1 <= num_images <= (size if len(self.sizes) == 1 else sys.maxsize):
      raise ValueError(f"--num_images={num_images} is out of range: {', '.join(self.sizes)} has 1 to {size} images")
    self._len = size if num_images is None else num_images
    self._first_label, self.class_names = {}, ()
    for name, source in self.sources.items():
      self._first_label[name] = len(self.class_names)
      self.class_names += _class_names(source)
    self._order = pipeline.mix(
      data,
      {
        name: grain.MapDataset.range(size)
        .shuffle(seed=pipeline.seeds(config.seed, name)[0])
        .repeat()
        .map(lambda index, name=name: (name, index))
        for name, size in self.sizes.items()
      },
    )

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, i: int) -> dict:
    name, index = self._order[i] if len(self.sources) > 1 else (*self.sources, i)
    decode = image_shards.file_bytes if self._size is None else transforms.to_rgb
    try:
      record = sources_lib.view(self.sources[name], int(index), decode)
    except sources_lib.UnreadableRecord as error:
      return {"unreadable": str(error)}
    captions = [caption for caption in record.get("captions") or (record["caption"],) if caption]
    facts = {
      "label": self._label(name, int(record["label"])),
      "captions": captions,
      "num_objects": int(record["num_objects"]),
    }
    if self._size is None:
      return {"data": record["image"], **facts}
    picture, augment = record["image"], self._augment[name]
    crops = [transforms.center_crop(picture, self._size)]
    crops += [augment(picture, np.random.default_rng([self._seed, i, copy])) for copy in range(1, self._copies)]
    return {"crops": np.stack(crops), **facts}

  def _label(self, name: str, label: int) -> int:
    if len(self.sources) == 1:
      return label
    known = 0 <= label < len(_class_names(self.sources[name]))
    return self._first_label[name] + label if known else -1


def _class_names(source) -> tuple[str, ...]:
  """Of the source, or of the module that draws it."""
  module = sys.modules[type(source).__module__]
  return tuple(getattr(source, "class_names", None) or getattr(module, "CLASS_NAMES", ()))
