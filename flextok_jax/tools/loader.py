"""Benchmark of the data loader: crops of photographs by the training pipeline and by a loop over Pillow's calls.

Each round reads all images in every way, in alternating order, so that other work on the machine affects all ways
alike:

- plain: open, convert, crop, resize, numpy, one image after another in one process;
- threads: the pipeline of training with threads;
- workers: the pipeline with worker processes, whose start is not counted.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import itertools
from pathlib import Path
import statistics
import tempfile
import threading
import time
from typing import Any

from flax.core.meta import unbox
import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from flextok_jax.config import with_fields
from flextok_jax.core import accelerators, timing
from flextok_jax.data import pipeline, transforms
from flextok_jax.data.sources import photos
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs, optim
from flextok_jax.training.state import init_state, make_update

WAYS = ("plain", "threads", "workers")
QUALITY = 90  # of the JPEG files
SIZE = (500, 375)  # of a file, pixels
STEPS = 20  # of training


def run(config: ConfigDict, count: int, parallel: int, rounds: int) -> list[dict]:
  """Measures reading and training, and prints the results.

  Args:
    config: size, crops and batch of the images, and the model that trains.
    count: number of files, crops of the photographs that scikit-image and scikit-learn ship.
    parallel, rounds: see measure.

  Returns:
    {"kind": "way"} with what measure returns for each way, and {"kind": "training"} with what train returns.
  """
  accelerators.start()  # training, after all rounds, needs them
  with tempfile.TemporaryDirectory() as folder:
    paths = write_photographs(Path(folder), count, SIZE)
    config = config.copy_and_resolve_references()
    for source in config.data.sources.values():
      source.weight = 0.0
    config.data.sources.folder.update(weight=1.0, path=f"{folder}/train", val_path=f"{folder}/validation")
    size = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    pixels = f"{SIZE[0]} x {SIZE[1]} px, {size:.0f} kB each, to crops of {config.image_size} px"
    print(f"{len(paths)} JPEG files of {pixels}", flush=True)
    rows = measure(config, paths, parallel, rounds)
    training = train(config, parallel, STEPS)
  print(format_report(rows, training))
  return [{"kind": "way", **row} for row in rows] + [{"kind": "training", **training}]


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
  """Writes JPEG files of `size` (width, height): `count` to folder/train and one to folder/validation.

  Returns:
    The paths of the former.
  """
  sources = [transforms.to_rgb(photos.photo_path(*photo[:2])) for photo in photos.TRAIN + photos.VALIDATION]
  rng, paths = np.random.default_rng(0), []
  for i in range(count + 1):
    picture = sources[i % len(sources)]
    box = transforms.random_box(*picture.size, rng, 0.4)
    path = folder / ("train" if i < count else "validation") / f"{i:06d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize(size, Image.Resampling.BICUBIC, box).save(path, quality=QUALITY)
    paths.append(path)
  return paths[:count]


def plain_loop(paths: list[Path], size: int, min_area: float) -> Iterator[np.ndarray]:
  """Yields random crops of the files, uint8 [size, size, 3], as a first draft of a loader would make them.

  They are resized by Pillow's default, bicubic; the pipeline's bilinear takes two thirds of the time.
  """
  rng = np.random.default_rng(0)
  for path in paths:
    image = Image.open(path, formats=("JPEG",)).convert("RGB")
    crop = image.crop(transforms.random_box(*image.size, rng, min_area))
    yield np.asarray(crop.resize((size, size)))


def measure(config: ConfigDict, paths: list[Path], parallel: int, rounds: int) -> list[dict]:
  """Times every way of reading the files.

  Args:
    config: with config.data.sources.folder at the files.
    paths: of the files.
    parallel: number of threads, and of worker processes.
    rounds: how often each way reads all files.

  Returns:
    For each of WAYS {"way", "images_per_second": [per round], "over_plain": [ratio per round], "cpu_ms": CPU time per
    image in ms, which does not depend on other programs; None for worker processes}.
  """
  rates: dict[str, list[float]] = {way: [] for way in WAYS}
  cpu: dict[str, list[float]] = {way: [] for way in WAYS}
  for index in range(rounds):
    for way in WAYS[:: -1 if index % 2 else 1]:
      seconds, busy, count = (
        _time_plain(config, paths) if way == "plain" else _time_pipeline(config, way, parallel, len(paths))
      )
      rates[way].append(count / seconds)
      cpu[way].append(1e3 * busy / count)
    print(
      f"round {index + 1} of {rounds}: " + ", ".join(f"{way} {rates[way][-1]:.0f} images/s" for way in WAYS), flush=True
    )
  return [
    {
      "way": way,
      "images_per_second": rates[way],
      "over_plain": [a / b for a, b in zip(rates[way], rates["plain"])],
      "cpu_ms": None if way == "workers" else statistics.median(cpu[way]),
    }
    for way in WAYS
  ]


def _time_plain(config: ConfigDict, paths: list[Path]) -> tuple[float, float, int]:
  """Returns (seconds, CPU seconds, images)."""
  begun = time.perf_counter(), time.process_time()
  count = sum(1 for _ in plain_loop(paths, config.image_size, config.data.crop_min_area))
  return time.perf_counter() - begun[0], time.process_time() - begun[1], count


def _time_pipeline(config: ConfigDict, way: str, parallel: int, images: int) -> tuple[float, float, int]:
  """Returns the same for whole batches, once all threads or workers run and batches made during the start are used."""
  batch = config.data.global_batch
  with _reading(config, way, parallel) as batches:
    for _ in range(4 * parallel if way == "workers" else 1):
      next(batches)
    begun = time.perf_counter(), time.process_time()
    count = sum(len(rows["image"]) for rows in itertools.islice(batches, -(-images // batch)))
    return time.perf_counter() - begun[0], time.process_time() - begun[1], count


@contextlib.contextmanager
def _reading(config: ConfigDict, way: str, parallel: int) -> Iterator[Iterator[dict]]:
  """Yields the batches and stops all reading afterwards."""
  threads, workers = (parallel, 0) if way == "threads" else (1, parallel)
  loading = pipeline.Loading(threads, workers, config.data.prefetch)
  data = dataclasses.replace(inputs.image_data(config), loading=loading)
  size = dict(global_batch=config.data.global_batch, image_size=config.image_size)
  batches: Any = pipeline.train_batches(data, **size, seed=config.seed)
  try:
    yield batches
  finally:
    batches.close()
    for thread in threading.enumerate():
      if thread.name.startswith("grain-prefetch"):  # close() does not wait for images in progress
        thread.join()


def train(config: ConfigDict, parallel: int, steps: int) -> dict:
  """Trains the model of config on the first device; threads read ahead while a step runs.

  Returns:
    {"step_ms": median time of a step without its batch, "waiting": share of the time spent waiting for a batch,
    "images_per_second"}; the first two steps, one of which compiles, are not counted.
  """
  config = with_fields(config, {"repa.weight": 0.0})  # these batches have no features of a teacher
  stage, optimizer = make_stage(config), optim.make_optimizer(config.optim, config.train.num_steps)
  update = jax.jit(make_update(stage, optimizer, accumulate_steps=1, decay=config.optim.ema_decay), donate_argnums=0)
  state = jax.jit(lambda key: unbox(init_state(stage, optimizer, key)))(jax.random.key(config.seed))
  waits, runs = [], []
  with _reading(config, "threads", parallel) as batches:
    for _ in range(steps + 2):
      begun = time.perf_counter()
      batch = next(batches)
      ready = time.perf_counter()
      state, metrics = update(state, batch, jax.random.key(0))
      jax.block_until_ready((state, metrics))
      waits.append(ready - begun)
      runs.append(time.perf_counter() - ready)
  wait, run = sum(waits[2:]), sum(runs[2:])
  return {
    "step_ms": 1e3 * statistics.median(runs[2:]),
    "waiting": wait / (wait + run),
    "images_per_second": steps * config.data.global_batch / (wait + run),
  }


def format_report(rows: list[dict], training: dict) -> str:
  """Returns a table of the ways (medians and ranges over the rounds) and a line about training."""
  lines = [f"{'':8}{'images/s':>10}{'(min .. max)':>18}{'over plain':>12}{'(min .. max)':>18}{'CPU ms/image':>17}"]
  for row in rows:
    cells = []
    for name, width in (("images_per_second", 10), ("over_plain", 12)):
      value, least, most = (timing.digits(f(row[name])) for f in (statistics.median, min, max))
      cells.append(f"{value:>{width}}{f'({least} .. {most})':>18}")
    cpu = "" if row["cpu_ms"] is None else timing.digits(row["cpu_ms"])
    lines.append(f"{row['way']:8}{''.join(cells)}{cpu:>17}".rstrip())
  lines.append(
    f"training: {timing.digits(training['images_per_second'])} images/s, {training['step_ms']:.1f} ms per "
    f"step, waits for data {training['waiting']:.1%} of the time"
  )
  return "\n".join(lines)
