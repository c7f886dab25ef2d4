"""Batches of a weighted mixture of sources, by grain.

Row r of the global batch of step s is element s * global_batch + r of one endless sequence that depends on the seed
alone: which source (a fixed interleaving by weight), which of its records (a fresh shuffle each epoch), which
augmentation (a generator keyed by the element's index). Processes, threads and workers only decide who computes an
element, and a restart begins at the element it needs.
"""

import zlib

from absl import flags
import grain
import numpy as np

from flextok_jax.data import sources as sources_lib
from flextok_jax.data import transforms

EVAL_SHUFFLE_SEED = 0  # order of the validation split


class _Records:
  """A source whose unreadable records are replaced by the next readable one: elements (record, passed over)."""

  def __init__(self, source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[dict, int]:
    return sources_lib.read(self._source, int(index))


class _Prepare(grain.transforms.RandomMap):
  """(record, passed over), generator -> row of the batch."""

  def __init__(self, data_cfg, source, image_size: int):
    self._size = image_size
    self._random_crop = data_cfg.crop == "random" and not source.framed
    self._min_area = data_cfg.crop_min_area
    self._flip = data_cfg.flip and source.flip

  def random_map(self, element, rng: np.random.Generator) -> dict:
    record, skipped = element
    if self._random_crop:
      image = transforms.random_resized_crop(record["image"], self._size, rng, self._min_area)
    else:
      image = transforms.center_crop(record["image"], self._size)
    if self._flip and rng.random() < 0.5:
      image = transforms.flip(image)
    return {"image": image, "label": np.int32(record["label"]), "num_objects": np.int32(record["num_objects"]),
            "unreadable": np.int32(skipped)}


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
    raise ValueError("no data source has a weight above 0: set one, "
                     "for example --config.data.sources.synthetic.weight=1")


def _elements(data_cfg, image_size: int, seed: int):
  """The endless sequence of rows."""
  parts, weights = [], []
  for name in sorted(data_cfg.sources):
    cfg = data_cfg.sources[name]
    if not cfg.weight:
      continue
    source = sources_lib.make_source(name, cfg, "train")
    seeds = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(2)
    shuffle_seed, augment_seed = (int(s) for s in seeds)
    part = grain.MapDataset.source(_Records(source)).shuffle(seed=shuffle_seed).repeat()
    parts.append(part.random_map(_Prepare(data_cfg, source, image_size), seed=augment_seed))
    weights.append(cfg.weight)
  return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=weights)


def train_batches(data_cfg, *, image_size: int, seed: int, start_step: int = 0, process_index: int = 0,
                  process_count: int = 1):
  """Returns an endless iterator over this process's rows of the global batches of steps start_step, start_step + 1, ...

  Rows are a contiguous block of b = global_batch / process_count. A batch: image uint8 [b, s, s, 3]; label,
  num_objects, unreadable (records passed over to get the row) int32 [b].
  """
  _check(data_cfg)
  size = data_cfg.global_batch
  if size < 1 or size % process_count:
    raise ValueError(f"config.data.global_batch={size} is not divisible by {process_count} processes")
  local = size // process_count
  rows = _LocalRows(_elements(data_cfg, image_size, seed), size, local, process_index * local, start_step)
  rows = grain.MapDataset.source(rows)
  if not data_cfg.num_workers:
    ready = max(data_cfg.prefetch * local, 1)
    options = grain.ReadOptions(num_threads=data_cfg.num_threads, prefetch_buffer_size=ready)
    return iter(rows.to_iter_dataset(options).batch(local, drop_remainder=True))
  if not flags.FLAGS.is_parsed():  # grain hands its flags to the workers; outside absl's app.run they have defaults
    flags.FLAGS.mark_as_parsed()
  # Workers take whole batches in turn: a batch is the unit that they interleave.
  options = grain.ReadOptions(num_threads=data_cfg.num_threads, prefetch_buffer_size=max(data_cfg.num_threads, 1))
  batches = rows.batch(local, drop_remainder=True).to_iter_dataset(options)
  return iter(batches.mp_prefetch(grain.MultiprocessingOptions(
      num_workers=data_cfg.num_workers, per_worker_buffer_size=max(data_cfg.prefetch // data_cfg.num_workers, 1))))


def eval_set(data_cfg, name: str, *, image_size: int, num_images: int) -> dict:
  """The first num_images records of a source's validation split under a fixed shuffle, centre-cropped.

  Fewer if the split is smaller. Returns image uint8 [n, s, s, 3], label and num_objects int32 [n], caption list of str.
  """
  if name not in data_cfg.sources:
    raise ValueError(f"unknown data source {name!r}: use one of {', '.join(sources_lib.NAMES)}")
  if num_images < 1:
    raise ValueError(f"an evaluation set needs at least one image, got {num_images}")
  source = _Records(sources_lib.make_source(name, data_cfg.sources[name], "validation"))
  order = grain.MapDataset.source(source).shuffle(seed=EVAL_SHUFFLE_SEED)
  records = [order[i][0] for i in range(min(num_images, len(order)))]
  return {
      "image": np.stack([transforms.center_crop(r["image"], image_size) for r in records]),
      "label": np.array([r["label"] for r in records], np.int32),
      "caption": [r["caption"] for r in records],
      "num_objects": np.array([r["num_objects"] for r in records], np.int32),
  }
