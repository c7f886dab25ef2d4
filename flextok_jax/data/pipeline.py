"""Batches of a weighted mixture of image sources, read by grain.

Row r of the global batch of step s is element s * global_batch + r of one endless sequence, which depends on the seed
alone: which source (a fixed interleaving by weight), which of its records (a new shuffle every epoch), which
augmentation (a generator keyed by the element's index). Processes, threads and workers only decide who computes an
element, and a restart continues at the element it needs. With several shapes, each step takes the rows of one of their
sequences (data/shapes.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import copy
import dataclasses
import gc
import signal
from typing import Any
import zlib

from absl import flags
import grain
import numpy as np

from flextok_jax.core import unreadable
from flextok_jax.core.errors import warn_once
from flextok_jax.data import shapes as shapes_lib
from flextok_jax.data import transforms
from flextok_jax.data.sources import base, registry

EVAL_SHUFFLE_SEED = 0  # of the order of EvalImages


@dataclasses.dataclass(frozen=True)
class Loading:
  """How a process reads ahead; does not affect the batches.

  Attributes:
    num_threads: threads that read, per process or worker.
    num_workers: worker processes per process; 0: threads only.
    prefetch: batches that are ready in advance.
  """

  num_threads: int
  num_workers: int
  prefetch: int


@dataclasses.dataclass(frozen=True)
class ImageData:
  """Which images to read, and how to crop them; the fields are those of config.data.

  Attributes:
    sources: {kind of source: {"weight": share of the images, and the arguments of its class (data/sources)}}; sources
      of weight 0 are not read in training.
    crop: "random" (random resized crop) or "center"; sources of composed pictures are never cropped.
    crop_min_area: smallest share of the area of a random crop.
    flip: whether half of the images are mirrored, if the source allows it.
    reduce_jpeg: whether a JPEG is decoded at 1/2, 1/4 or 1/8 if its crop needs no more pixels.
    loading: threads and workers.
    max_unreadable: share of unreadable images above which evaluation and the writing of shards stop.
    shapes: (height, width) of the crops, each batch of one; (): squares of the image_size that a function is given.
    shape_weights: share of each shape; (): by the sizes of the pictures.

  Raises:
    ValueError: an unknown source or crop, or a number out of range.
  """

  sources: Mapping[str, Mapping[str, Any]]
  crop: str
  crop_min_area: float
  flip: bool
  reduce_jpeg: bool
  loading: Loading
  max_unreadable: float
  shapes: Sequence[shapes_lib.Shape] = ()
  shape_weights: Sequence[float] = ()

  def __post_init__(self):
    if self.shape_weights and not self.shapes:
      raise ValueError("data.shape_weights without data.shapes: set data.shapes to as many (height, width)")
    if self.crop not in ("random", "center"):
      raise ValueError(f"unknown crop {self.crop!r}: use 'random' or 'center'")
    if not 0.0 < self.crop_min_area <= 1.0:
      raise ValueError(f"crop_min_area={self.crop_min_area} must be in (0, 1]")
    for kind, settings in self.sources.items():
      registry.check_kind(kind)
      if not settings["weight"] >= 0.0:
        raise ValueError(f"the weight of source {kind!r} must be at least 0, got {settings['weight']}")

  def open(self, split: str) -> dict[str, base.Source]:
    """Returns {kind: source} of the sources with a weight above 0, sorted by kind; ValueError if there is none."""
    kinds = sorted(kind for kind, settings in self.sources.items() if settings["weight"])
    if not kinds:
      raise ValueError("no data source has a weight above 0: set one, such as data.sources.synthetic.weight=1")
    return {kind: self.open_source(kind, split) for kind in kinds}

  def open_source(self, kind: str, split: str) -> base.Source:
    """Returns a source, whatever its weight."""
    if kind not in self.sources:
      registry.check_kind(kind)
      raise ValueError(f"data source {kind!r} has no settings")
    settings = {name: value for name, value in self.sources[kind].items() if name != "weight"}
    return registry.make_source(kind, split, **settings)

  def buckets(self, image_size: int, split: str = "train") -> list[shapes_lib.Bucket]:
    """Returns the pictures of all sources by the shape in which they are read; without shapes, all at image_size.

    Without shape_weights the headers of all pictures are read.

    Raises:
      FileNotFoundError, ValueError: a source cannot be opened, or see shapes.by_weight and shapes.by_size.
    """
    sources = self.open(split)
    shares, shapes = {kind: self.sources[kind]["weight"] for kind in sources}, [(h, w) for h, w in self.shapes]
    if not shapes:
      return [shapes_lib.whole(sources, shares, (image_size, image_size))]
    if self.shape_weights:
      return shapes_lib.by_weight(sources, shares, shapes, self.shape_weights)
    return shapes_lib.by_size(sources, shares, shapes, self.loading.num_threads, self.max_unreadable)


def mix(parts: Mapping[str, grain.MapDataset], weights: Mapping[str, float]) -> grain.MapDataset:
  """Interleaves endless data sets, {kind of source: data set}, by the weights of their sources."""
  if len(parts) == 1:
    return next(iter(parts.values()))
  return grain.MapDataset.mix([*parts.values()], weights=[weights[kind] for kind in parts])


class Augment:
  """The random crop and flip of a source: (picture or open file, generator) -> uint8 [h, w, 3] of a size.

  Attributes:
    varies: whether two draws can differ.
  """

  def __init__(self, data: ImageData, source: base.Source, size: transforms.Size):
    self._size = size
    self._reduce = data.reduce_jpeg
    self._random_crop = data.crop == "random" and not source.framed
    self._min_area = data.crop_min_area
    self._flip = data.flip and source.flip
    self.varies = self._random_crop or self._flip

  def __call__(self, image: Any, rng: np.random.Generator) -> np.ndarray:
    if self._random_crop:
      image = transforms.random_resized_crop(image, self._size, rng, self._min_area, self._reduce)
    else:
      image = transforms.center_crop(image, self._size, self._reduce)
    return transforms.flip(image) if self._flip and rng.random() < 0.5 else image


class _PrepareRow(grain.transforms.RandomMap):
  """(index of a record, generator) -> row of the batch, from the first readable record at or after the index.

  Files are decoded here, where the crop is known.
  """

  def __init__(self, source: base.Source, augment: Augment):
    self._source, self._augment = source, augment

  def random_map(self, index: int, rng: np.random.Generator) -> dict:
    start = rng.bit_generator.state

    def crop(image) -> np.ndarray:
      rng.bit_generator.state = start  # an unreadable file before this one has used the generator
      return self._augment(image, rng)

    record, skipped = base.read(self._source, int(index), crop, with_captions=False)
    return {
      "image": record["image"],
      "label": np.int32(record["label"]),
      "num_objects": np.int32(record["num_objects"]),
      "unreadable": np.int32(skipped),
    }


class _LocalRows:
  """The rows of one process in the order of steps, a random-access view of the endless sequence of elements."""

  def __init__(self, elements: Any, global_batch: int, local_batch: int, first_row: int, start_step: int):
    self._elements = elements
    self._global_batch = global_batch
    self._local_batch = local_batch
    self._first_row = first_row
    self._start_step = start_step

  def __len__(self) -> int:
    return (len(self._elements) // self._global_batch - self._start_step) * self._local_batch

  def __getitem__(self, index: int) -> dict:
    step, row = divmod(int(index), self._local_batch)
    return self._elements[(self._start_step + step) * self._global_batch + self._first_row + row]


def seeds(seed: int, name: str) -> tuple[int, int]:
  """Returns the seeds of the shuffle and of the augmentation of a named sequence."""
  shuffle_seed, augment_seed = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(2)
  return int(shuffle_seed), int(augment_seed)


def train_batches(
  data: ImageData,
  *,
  image_size: int,
  seed: int,
  global_batch: int,
  buckets: Sequence[shapes_lib.Bucket] | None = None,
  **batching: Any,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns an endless iterator over this process's rows of the global batches.

  A batch of b rows has image uint8 [b, h, w, 3], of the shape of one of the buckets; label, num_objects and unreadable
  (records skipped to get the row) int32 [b]. Buckets take turns by their weights. Each has its own shuffle.

  Args:
    image_size: of the images, if data has no shapes.
    buckets: data.buckets(image_size), if they are known already.
    **batching: start_step, process_index, process_count of local_batches.

  Raises:
    FileNotFoundError, ValueError: see ImageData.buckets; or global_batch is not divisible by process_count.
  """
  buckets, sequences = data.buckets(image_size) if buckets is None else buckets, []
  for bucket in buckets:
    parts = {}
    for kind, (_, source) in bucket.sources.items():
      name = kind if len(buckets) == 1 else f"{kind} {bucket.shape}"
      shuffle_seed, augment_seed = seeds(seed, name)
      part = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed).repeat()
      parts[kind] = part.random_map(_PrepareRow(source, Augment(data, source, bucket.shape)), seed=augment_seed)
    sequences.append(mix(parts, {kind: share for kind, (share, _) in bucket.sources.items()}))
  elements = sequences[0]
  if len(buckets) > 1:
    elements = shapes_lib.Interleaved(sequences, [bucket.weight for bucket in buckets], global_batch)
  return local_batches(elements, data.loading, global_batch=global_batch, **batching)


def local_batches(
  elements: Any,
  loading: Loading,
  *,
  global_batch: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  by_batch: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns an endless iterator over a process's rows of the batches of steps start_step, start_step + 1, ...

  The rows are a contiguous block of b = global_batch / process_count rows of the global batch.

  Args:
    elements: an endless random-access sequence of dicts of arrays, the rows of all steps.
    by_batch: see read_ahead.
  """
  if global_batch < 1 or global_batch % process_count:
    raise ValueError(f"global_batch={global_batch} is not divisible by {process_count} processes")
  local = global_batch // process_count
  rows = _LocalRows(elements, global_batch, local, process_index * local, start_step)
  return read_ahead(rows, local, loading, by_batch=by_batch)


def read_ahead(
  rows: Any,
  batch_size: int,
  loading: Loading,
  *,
  drop_remainder: bool = True,
  batch_fn: Callable[[list], Any] | None = None,
  by_batch: bool = False,
) -> Iterator:
  """Returns an iterator over a random-access sequence in batches, which threads or workers read ahead.

  Args:
    batch_fn: joins a list of batch_size rows; None: stacks them into arrays.
    by_batch: each thread makes a whole batch, not a row: for rows that cost less to make than to hand over.
  """
  batching = dict(batch_size=batch_size, drop_remainder=drop_remainder, batch_fn=batch_fn)
  dataset = grain.MapDataset.source(rows)
  if loading.num_workers:
    if not flags.FLAGS.is_parsed():  # grain passes the flags to its workers; outside of absl's app.run use the defaults
      flags.FLAGS.mark_as_parsed()
    # Workers take whole batches in turn: the batch is the unit of interleaving.
    options = grain.ReadOptions(num_threads=loading.num_threads, prefetch_buffer_size=max(loading.num_threads, 1))
    workers = grain.MultiprocessingOptions(
      num_workers=loading.num_workers, per_worker_buffer_size=max(loading.prefetch // loading.num_workers, 1)
    )
    return iter(dataset.batch(**batching).to_iter_dataset(options).mp_prefetch(workers, ignore_interrupts))
  if by_batch:
    ready = max(loading.prefetch, 1)
    options = grain.ReadOptions(num_threads=min(loading.num_threads, ready), prefetch_buffer_size=ready)
    return iter(dataset.batch(**batching).to_iter_dataset(options))
  ready = max(loading.prefetch * batch_size, 1)
  options = grain.ReadOptions(num_threads=loading.num_threads, prefetch_buffer_size=ready)
  return iter(dataset.to_iter_dataset(options).batch(**batching))


@contextlib.contextmanager
def closing(batches: Any, loading: Loading) -> Iterator[Any]:
  """Ends the threads or workers that read batches ahead at the end of the with statement."""
  try:
    yield batches
  finally:
    batches.close()
    if loading.num_workers:
      gc.collect()  # of batches in shared memory, which Python would report as leaked at its end


def ignore_interrupts(worker: int, num_workers: int):
  """Makes a worker ignore Ctrl-C, which a terminal sends to all processes: the process that reads from it stops it."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)


class EvalImages:
  """The first num_images images of a split of a source in a fixed shuffled order; fewer if it is smaller.

  Slicing reads the images, uint8 [n, h, w, 3], with data.loading's threads. The next readable image takes the place of
  an unreadable one. Where images are not cropped, by_size divides them.

  Args:
    data: which images to read.
    kind: of the source.
    image_size: in pixels.
    num_images: images at most.
    split: "train" or "validation".
    resize: see transforms.to_size, as for `multiple`.

  Attributes:
    shape: of all images, if they are of one size.

  Raises:
    FileNotFoundError, ValueError: the source cannot be opened, or num_images is below 1.
  """

  def __init__(
    self,
    data: ImageData,
    kind: str,
    *,
    image_size: int,
    num_images: int,
    split: str = "validation",
    resize: str = "crop",
    multiple: int = 1,
  ):
    if num_images < 1:
      raise ValueError(f"an evaluation set needs at least one image, got num_images={num_images}")
    self._source = data.open_source(kind, split)
    self._kind, self._max_unreadable = kind, data.max_unreadable
    self._unreadable: set[int] = set()  # their positions in the source
    self._order: Any = grain.MapDataset.range(len(self._source)).shuffle(seed=EVAL_SHUFFLE_SEED)
    self._threads = max(data.loading.num_threads, 1)
    self._decode = lambda image: transforms.to_size(image, resize, image_size, multiple)
    self._multiple = multiple
    self.shape: tuple[int, ...] = (min(num_images, len(self._source)), image_size, image_size, 3)
    self._total = self.shape[0]

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice) -> np.ndarray:
    return np.stack([record["image"] for record in self.records(rows, with_captions=False)])

  def records(self, rows: slice, with_captions: bool = True) -> list[base.Record]:
    """Returns the records of a slice; ValueError if too many were unreadable (core/unreadable.py)."""
    return self._read(rows, self._decode, with_captions)

  def by_size(self) -> list[tuple[np.ndarray, "EvalImages"]]:
    """Returns (numbers int32 [n], these images) of each size that occurs; reads all images, without keeping them.

    Raises:
      ValueError: the patches do not divide an image.
    """
    found = self._read(slice(None), lambda image: self._decode(image).shape, with_captions=False)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(record["image"] for record in found):
      if any(side % self._multiple for side in shape[:2]):
        raise ValueError(
          f"image {i} of source {self._kind!r} has {shape[0]} x {shape[1]} pixels: sides must be multiples of "
          f"{self._multiple}; resize='fit' makes them so"
        )
      groups.setdefault(shape, []).append(i)
    parts = []
    for shape, rows in groups.items():
      part = copy.copy(self)
      part._order, part.shape = [self._order[i] for i in rows], (len(rows), *shape)
      parts.append((np.array(rows, np.int32), part))
    return parts

  def _read(self, rows: slice, decode: Callable[[Any], Any], with_captions: bool) -> list[base.Record]:
    positions = [int(self._order[i]) for i in range(*rows.indices(len(self)))]
    read = lambda position: base.read(self._source, position, decode, with_captions)
    records = []
    with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
      for position, (record, skipped) in zip(positions, pool.map(read, positions)):
        records.append(record)
        self._unreadable |= {(position + i) % len(self._source) for i in range(skipped)}
    what = f"{self._total} images of source {self._kind!r}"
    unreadable.check(len(self._unreadable), self._total, self._max_unreadable, what=what)
    if self._unreadable:
      warn_once(f"{len(self._unreadable)} of {what} are unreadable: the next ones take their places")
    return records


def eval_set(data: ImageData, kind: str, *, image_size: int, num_images: int) -> dict:
  """Returns all of EvalImages: image uint8 [n, h, w, 3], label and num_objects int32 [n], caption a list of str."""
  records = EvalImages(data, kind, image_size=image_size, num_images=num_images).records(slice(None))
  return {
    "image": np.stack([r["image"] for r in records]),
    "label": np.array([r["label"] for r in records], np.int32),
    "caption": [r["caption"] for r in records],
    "num_objects": np.array([r["num_objects"] for r in records], np.int32),
  }
