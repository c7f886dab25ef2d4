"""Batches of a weighted mixture of sources, by grain.

Row r of the global batch of step s is element s * global_batch + r of one endless sequence that depends on the seed
alone: which source (a fixed interleaving by weight), which of its records (a fresh shuffle each epoch), which
augmentation (a generator keyed by the element's index). Processes, threads and workers only decide who computes an
element, and a restart begins at the element it needs.
"""

import concurrent.futures
import zlib

from absl import flags
import grain
import numpy as np

from flextok_jax.data import transforms
from flextok_jax.data.sources import registry as sources_lib

EVAL_SHUFFLE_SEED = 0  # order of the validation split


class Augment:
  """(picture or open file, generator) -> uint8 [size, size, 3]: the crop and the flip that config.data allows a source.

  `varies` says whether two draws can differ.
  """

  def __init__(self, data_cfg, source, image_size: int):
    self._size = image_size
    self._reduce = data_cfg.reduce_jpeg
    self._random_crop = data_cfg.crop == "random" and not source.framed
    self._min_area = data_cfg.crop_min_area
    self._flip = data_cfg.flip and source.flip
    self.varies = self._random_crop or self._flip

  def __call__(self, image, rng: np.random.Generator) -> np.ndarray:
    if self._random_crop:
      image = transforms.random_resized_crop(image, self._size, rng, self._min_area, self._reduce)
    else:
      image = transforms.center_crop(image, self._size, self._reduce)
    return transforms.flip(image) if self._flip and rng.random() < 0.5 else image


class _Prepare(grain.transforms.RandomMap):
  """Index of a record, generator -> row of the batch, of the next record that can be read.

  A file is decoded here, where its crop is known.
  """

  def __init__(self, source, augment: Augment):
    self._source, self._augment = source, augment

  def random_map(self, index: int, rng: np.random.Generator) -> dict:
    first = rng.bit_generator.state

    def crop(image) -> np.ndarray:
      rng.bit_generator.state = first  # an unreadable file before it has drawn from the generator
      return self._augment(image, rng)

    record, skipped = sources_lib.read(self._source, int(index), crop)
    return {
      "image": record["image"],
      "label": np.int32(record["label"]),
      "num_objects": np.int32(record["num_objects"]),
      "unreadable": np.int32(skipped),
    }


class _LocalRows:
  """The rows of one process in the order of steps, as a random-access view of the endless sequence of elements."""

  def __init__(self, elements, global_batch: int, local_batch: int, first_row: int, start_step: int):
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


def _check(data_cfg):
  if data_cfg.crop not in ("random", "center"):
    raise ValueError(f"unknown config.data.crop {data_cfg.crop!r}: use 'random' or 'center'")
  if not 0.0 < data_cfg.crop_min_area <= 1.0:
    raise ValueError(f"config.data.crop_min_area must lie in (0, 1], got {data_cfg.crop_min_area}")
  for name in data_cfg.sources:
    if name not in sources_lib.NAMES:
      raise ValueError(f"unknown data source {name!r}: use one of {', '.join(sources_lib.NAMES)}")
    if not data_cfg.sources[name].weight >= 0.0:
      raise ValueError(f"config.data.sources.{name}.weight must be >= 0, got {data_cfg.sources[name].weight}")
  if not any(data_cfg.sources[name].weight for name in data_cfg.sources):
    raise ValueError(
      "no data source has a weight above 0: set one, for example --config.data.sources.synthetic.weight=1"
    )


def open_sources(data_cfg, split: str) -> dict:
  """Returns {name: source} of those with a weight above 0, by name; ValueError for settings that make no sense."""
  _check(data_cfg)
  names = sorted(name for name in data_cfg.sources if data_cfg.sources[name].weight)
  return {name: sources_lib.make_source(name, data_cfg.sources[name], split) for name in names}


def seeds(seed: int, name: str) -> tuple[int, int]:
  """Returns the seeds of the shuffle and of the augmentation of what is called `name`."""
  return tuple(int(s) for s in np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(2))


def mix(data_cfg, parts: dict) -> grain.MapDataset:
  """Interleaves endless data sets, {name of a source: data set}, by the weights of their sources."""
  datasets, weights = list(parts.values()), [data_cfg.sources[name].weight for name in parts]
  return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights=weights)


def _elements(data_cfg, image_size: int, seed: int):
  """The endless sequence of rows."""
  parts = {}
  for name, source in open_sources(data_cfg, "train").items():
    shuffle_seed, augment_seed = seeds(seed, name)
    part = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed).repeat()
    parts[name] = part.random_map(_Prepare(source, Augment(data_cfg, source, image_size)), seed=augment_seed)
  return mix(data_cfg, parts)


def train_batches(
  data_cfg, *, image_size: int, seed: int, start_step: int = 0, process_index: int = 0, process_count: int = 1
):
  """Returns an endless iterator over this process's rows of the global batches of steps start_step, start_step + 1, ...

  Rows are a contiguous block of b = global_batch / process_count. A batch: image uint8 [b, s, s, 3]; label,
  num_objects, unreadable (records passed over to get the row) int32 [b].
  """
  elements = _elements(data_cfg, image_size, seed)
  return local_batches(elements, data_cfg, start_step, process_index, process_count)


def local_batches(elements, data_cfg, start_step: int, process_index: int, process_count: int, **options):
  """train_batches of any endless sequence of elements, dicts of arrays; options are those of stream."""
  size = data_cfg.global_batch
  if size < 1 or size % process_count:
    raise ValueError(f"config.data.global_batch={size} is not divisible by {process_count} processes")
  local = size // process_count
  return stream(_LocalRows(elements, size, local, process_index * local, start_step), local, data_cfg, **options)


def stream(rows, size: int, data_cfg, *, drop_remainder: bool = True, batch_fn=None, by_batch: bool = False):
  """Returns an iterator over a random-access sequence in batches, read ahead by config.data's threads or workers.

  Args:
    batch_fn: joins a list of `size` rows, by default into arrays.
    by_batch: a thread makes a whole batch, not a row: for rows so cheap that handing them over would cost the most.
  """
  rows = grain.MapDataset.source(rows)
  batching = dict(drop_remainder=drop_remainder, batch_fn=batch_fn)
  if not data_cfg.num_workers and by_batch:
    ready = max(data_cfg.prefetch, 1)
    options = grain.ReadOptions(num_threads=min(data_cfg.num_threads, ready), prefetch_buffer_size=ready)
    return iter(rows.batch(size, **batching).to_iter_dataset(options))
  if not data_cfg.num_workers:
    ready = max(data_cfg.prefetch * size, 1)
    options = grain.ReadOptions(num_threads=data_cfg.num_threads, prefetch_buffer_size=ready)
    return iter(rows.to_iter_dataset(options).batch(size, **batching))
  if not flags.FLAGS.is_parsed():  # grain hands its flags to the workers; outside absl's app.run they have defaults
    flags.FLAGS.mark_as_parsed()
  # Workers take whole batches in turn: a batch is the unit that they interleave.
  options = grain.ReadOptions(num_threads=data_cfg.num_threads, prefetch_buffer_size=max(data_cfg.num_threads, 1))
  batches = rows.batch(size, **batching).to_iter_dataset(options)
  return iter(
    batches.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=data_cfg.num_workers, per_worker_buffer_size=max(data_cfg.prefetch // data_cfg.num_workers, 1)
      )
    )
  )


class EvalImages:
  """The first num_images records of a source's validation split under a fixed shuffle, centre-cropped.

  Fewer if the split is smaller. A slice reads its records, by config.data's threads: uint8 [n, s, s, 3]. shape is that
  of all images.

  Raises:
    ValueError: an unknown source, or num_images below 1.
  """

  def __init__(self, data_cfg, name: str, *, image_size: int, num_images: int):
    if name not in data_cfg.sources:
      raise ValueError(f"unknown data source {name!r}: use one of {', '.join(sources_lib.NAMES)}")
    if num_images < 1:
      raise ValueError(f"an evaluation set needs at least one image, got {num_images}")
    self._source = sources_lib.make_source(name, data_cfg.sources[name], "validation")
    self._order = grain.MapDataset.range(len(self._source)).shuffle(seed=EVAL_SHUFFLE_SEED)
    self._threads = max(data_cfg.num_threads, 1)
    self.shape = (min(num_images, len(self._source)), image_size, image_size, 3)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice) -> np.ndarray:
    return np.stack([record["image"] for record in self.records(rows)])

  def records(self, rows: slice) -> list[dict]:
    """Returns the records of a slice, see data/sources/registry.py."""
    crop = lambda image: transforms.center_crop(image, self.shape[1])
    read = lambda i: sources_lib.read(self._source, int(self._order[i]), crop)[0]
    with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
      return list(pool.map(read, range(*rows.indices(len(self)))))


def eval_set(data_cfg, name: str, *, image_size: int, num_images: int) -> dict:
  """Returns all of EvalImages: image uint8 [n, s, s, 3], label and num_objects int32 [n], caption list of str."""
  records = EvalImages(data_cfg, name, image_size=image_size, num_images=num_images).records(slice(None))
  return {
    "image": np.stack([r["image"] for r in records]),
    "label": np.array([r["label"] for r in records], np.int32),
    "caption": [r["caption"] for r in records],
    "num_objects": np.array([r["num_objects"] for r in records], np.int32),
  }
