"""The images of a split in a fixed order, as shards store them."""

import bisect
import itertools
import sys
from typing import Any

import grain
import numpy as np

from flextok_jax.data import pipeline, transforms
from flextok_jax.data.shapes import Shape, Turns, check_weights, nearest, read_sizes
from flextok_jax.data.shards.images import file_bytes
from flextok_jax.data.sources import base
from flextok_jax.data.transforms import Size


class SplitImages:
  """The images of a split in a fixed order: len(images), images[i] -> dict.

  One source: its records in order. Several sources: their mixture by weight, as in training. An element has label,
  num_objects and captions, and "crops" uint8 [copies, image_size, image_size, 3]: the centre crop, then crops drawn as
  in training, each from (seed, i, copy) alone. Without an image_size it has "data", the bytes of an image file, instead
  of crops. An element that cannot be read has only "unreadable", the reason.

  With data.shapes an element also has "size", the (height, width) of its crops, and the images are in the order of
  their shapes. A shape is chosen as in training, but each image has one only.

  Args:
    image_size: height and width of the crops without data.shapes, pixels; None: image files as they are stored.
    num_images: None: all of a single source that is not endless.
    copies: crops per image.

  Attributes:
    class_names: of the labels, () if they have no names. In a mixture, labels number the classes of all sources one
      after another, and labels without names become -1.
    sizes: {kind of source: number of its records}.
    groups: [((height, width) or None, number of images)] of consecutive images of one shape.
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
    shapes = [(h, w) for h, w in data.shapes] if image_size is not None else []
    sizes: list[Size] = [*shapes] if shapes or image_size is None else [image_size]
    self._augment = {
      (kind, size): pipeline.Augment(data, source, size) for kind, source in self.sources.items() for size in sizes
    }
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

    self.groups: list[tuple[Shape | None, int]] = [(None, self._len)]
    self._places, self._ends = np.arange(0), [self._len]
    if shapes:
      chosen = self._choose(data, shapes)
      self._places = np.argsort(chosen, kind="stable")
      counts = np.bincount(chosen, minlength=len(shapes))
      self.groups = [(shape, int(count)) for shape, count in zip(shapes, counts) if count]
      self._ends = list(itertools.accumulate(count for _, count in self.groups))

  def _choose(self, data: pipeline.ImageData, shapes: list[Shape]) -> np.ndarray:
    """Returns the number of the shape of each image, int [n]."""
    if data.shape_weights:
      check_weights(shapes, data.shape_weights)
      turns = Turns(data.shape_weights)
      return np.array([turns[i][0] for i in range(self._len)])
    reading = data.loading.num_threads, data.max_unreadable
    found = {kind: nearest(read_sizes(kind, source, *reading), shapes) for kind, source in self.sources.items()}
    return np.array([found[kind][index] for kind, index in map(self._element, range(self._len))])

  def _element(self, i: int) -> tuple[str, int]:
    """Returns (kind of source, record) of an image, in the order without shapes."""
    return self._order[i] if len(self.sources) > 1 else (next(iter(self.sources)), i)

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
    size: Any = self.groups[bisect.bisect_right(self._ends, i)][0] if len(self._places) else None
    i = int(self._places[i]) if len(self._places) else i
    kind, index = self._element(i)
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
    if size is not None:
      facts["size"] = size
    size = size or self._size
    picture, augment = record["image"], self._augment[kind, size]
    crops = [transforms.center_crop(picture, size)]
    crops += [augment(picture, np.random.default_rng([self._seed, i, copy])) for copy in range(1, self._copies)]
    return {"crops": np.stack(crops), **facts}

  def _label(self, kind: str, label: int) -> int:
    if len(self.sources) == 1:
      return label
    return self._first_label[kind] + label if 0 <= label < len(self.sources[kind].class_names) else -1
