"""Measures how fast crops come from files of photographs, beside a loop over Pillow's calls.

python -m flextok_jax.benchmark_loader --config=configs/loader.py [--images=512] [--parallel=2] [--out=FILE.jsonl]

Writes JPEG files, crops of the photographs that scikit-image and scikit-learn ship, into a temporary folder. Each round
reads that many images in every way, and their order turns from round to round, so that whatever else the machine does
meets all:

- plain: open, convert, crop, resize, numpy, one image after another in one process;
- threads: the pipeline of training with --parallel threads;
- workers: the same with --parallel worker processes, whose start does not count.

Then the model of the config trains on the images by threads, and the time in which it waits for its next batch is
counted. Prints a table; --out gets a JSON line for each way and one for training.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
import statistics
import tempfile
import threading
import time

from absl import flags
from flax.core.meta import unbox
import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from flextok_jax import cli
from flextok_jax.core import files, timing
from flextok_jax.data import pipeline, transforms
from flextok_jax.data.sources import photos
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs, optim
from flextok_jax.training.state import init_state, make_update

WAYS = ("plain", "threads", "workers")
QUALITY = 90  # of the JPEG files
_FLAGS = {
  "images": (512, "Files, and images that a way reads in a round."),
  "width": (500, "Of a file, pixels."),
  "height": (375, "Of a file, pixels."),
  "parallel": (2, "Threads, and worker processes."),
  "rounds": (3, "Timed rounds."),
  "steps": (20, "Of training."),
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  cli.define_config_flag("Size, crops and batch of the images, and the model that trains.", values)
  for name, (default, text) in _FLAGS.items():
    flags.DEFINE_integer(name, default, text, flag_values=values)
  flags.DEFINE_string("out", None, "File for the JSON lines, written anew.", flag_values=values)


def main(values: flags.FlagValues):
  """Measures what the flags ask for."""
  if values.config is None:
    raise ValueError("nothing to measure: give --config=configs/loader.py")
  for name in _FLAGS:
    if values[name].value < 1:
      raise ValueError(f"--{name}={values[name].value} must be at least 1")
  with tempfile.TemporaryDirectory() as folder:
    paths = write_photographs(Path(folder), values.images, (values.width, values.height))
    config = values.config.copy_and_resolve_references()
    for source in config.data.sources.values():
      source.weight = 0.0
    config.data.sources.folder.update(weight=1.0, path=f"{folder}/train", val_path=f"{folder}/validation")
    size = sum(path.stat().st_size for path in paths) / len(paths)
    print(
      f"{len(paths)} JPEG files of {values.width} x {values.height} px, {size / 1e3:.0f} kB each, to crops of "
      f"{config.image_size} px",
      flush=True,
    )
    rows = measure(config, paths, values.parallel, values.rounds)
    training = train(config, values.parallel, values.steps)
  print(format_report(rows, training))
  if values.out:
    lines = [{"kind": "way", **row} for row in rows] + [{"kind": "training", **training}]
    files.write_file(Path(values.out), "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
  """Writes `count` JPEG files of width x height pixels to folder/train and one to folder/validation: the former."""
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
  """Random crops of the files, each uint8 [size, size, 3], as a first draft of a loader would make them.

  Resized by Pillow's default, bicubic; the pipeline's bilinear takes two thirds of its time.
  """
  rng = np.random.default_rng(0)
  for path in paths:
    image = Image.open(path).convert("RGB")
    crop = image.crop(transforms.random_box(*image.size, rng, min_area))
    yield np.asarray(crop.resize((size, size)))


def measure(config: ConfigDict, paths: list[Path], parallel: int, rounds: int) -> list[dict]:
  """Returns a row for each of WAYS: {"way", "images_per_second": [a round], "over_plain": [a round], "cpu_ms"}.

  cpu_ms is the processor time of an image in milliseconds, which other programs do not change, with what the process
  does between images; None of worker processes.
  """
  rates, cpu = {way: [] for way in WAYS}, {way: [] for way in WAYS}
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
  """(seconds, seconds of processor time, images)."""
  begun = time.perf_counter(), time.process_time()
  count = sum(1 for _ in plain_loop(paths, config.image_size, config.data.crop_min_area))
  return time.perf_counter() - begun[0], time.process_time() - begun[1], count


def _time_pipeline(config: ConfigDict, way: str, parallel: int, images: int) -> tuple[float, float, int]:
  """The same of whole batches, once all threads or workers are at work and have used up what they made before that."""
  batch = config.data.global_batch
  with _reading(config, way, parallel) as batches:
    for _ in range(4 * parallel if way == "workers" else 1):
      next(batches)
    begun = time.perf_counter(), time.process_time()
    count = sum(len(rows["image"]) for rows in itertools.islice(batches, -(-images // batch)))
    return time.perf_counter() - begun[0], time.process_time() - begun[1], count


@contextlib.contextmanager
def _reading(config: ConfigDict, way: str, parallel: int) -> Iterator[Iterator[dict]]:
  """Yields the batches; afterwards nothing reads any more."""
  threads, workers = (parallel, 0) if way == "threads" else (1, parallel)
  loading = pipeline.Loading(threads, workers, config.data.prefetch)
  data = dataclasses.replace(inputs.image_data(config), loading=loading)
  size = dict(global_batch=config.data.global_batch, image_size=config.image_size)
  batches = pipeline.train_batches(data, **size, seed=config.seed)
  try:
    yield batches
  finally:
    batches.close()
    for thread in threading.enumerate():
      if thread.name.startswith("grain-prefetch"):  # close() does not wait for the images that they are at
        thread.join()


def train(config: ConfigDict, parallel: int, steps: int) -> dict:
  """Trains the model of config on the first device, fed by threads, which read ahead while a step runs.

  Returns:
    {"step_ms": a step's time without its batch, "waiting": share of the time in which nothing ran for want of a batch,
    "images_per_second"}; the first two steps, of which one compiles, do not count.
  """
  config = config.copy_and_resolve_references()
  config.repa.weight = 0.0  # these batches have no features of a teacher
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
  """Returns a table of the ways (medians and ranges over the rounds), and a line on training."""
  lines = [f"{'':8}{'images/s':>10}{'(min .. max)':>18}{'over plain':>12}{'(min .. max)':>18}{'CPU ms an image':>17}"]
  for row in rows:
    cells = []
    for name, width in (("images_per_second", 10), ("over_plain", 12)):
      value, least, most = (timing.digits(f(row[name])) for f in (statistics.median, min, max))
      cells.append(f"{value:>{width}}{f'({least} .. {most})':>18}")
    cpu = "" if row["cpu_ms"] is None else timing.digits(row["cpu_ms"])
    lines.append(f"{row['way']:8}{''.join(cells)}{cpu:>17}".rstrip())
  lines.append(
    f"training: {timing.digits(training['images_per_second'])} images/s, {training['step_ms']:.1f} ms a "
    f"step, waits for data {training['waiting']:.1%} of the time"
  )
  return "\n".join(lines)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
