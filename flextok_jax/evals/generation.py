"""Metrics of a generator's samples: gFID, sFID, inception score, precision, recall, CLIP score, top-1 accuracy."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.evals import reconstruction
from flextok_jax.evals.accumulator import Accumulator, means_and_intervals
from flextok_jax.evals.metrics import frechet
from flextok_jax.evals.metrics import samples as sample_metrics
from flextok_jax.evals.metrics.reference import Reference
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report
from flextok_jax.inference.generator import ARGenerator
from flextok_jax.inference.prompts import Condition
from flextok_jax.ops import nested
from flextok_jax.parallel import batching, processes, sharding
from flextok_jax.weights.perception import networks

INCEPTION = ("gfid", "sfid", "is", "precision", "recall", "fid_infinity")  # from Inception's features
NAMES = (*INCEPTION, "clip", "top1")
LAYERS = {"gfid": "pool", "sfid": "spatial", "fid_infinity": "pool"}  # statistics of the reference that a metric needs
NEED_IMAGES = ("precision", "recall")  # of the reference
NEED_REFERENCE = (*LAYERS, *NEED_IMAGES)
SET = "samples"
_SPLITS = 10  # of the inception score


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of an evaluation of samples.

  Attributes:
    metrics: from NAMES.
    num_tokens: token counts, the columns of the report.
    num_images: samples.
    batch_size: samples per batch, at most.
    seed: of the report.
    grid_images: samples kept as examples.
    folder: for samples_<count>.npz, arr_0 uint8 [n, h, w, 3]; None: not written.
  """

  metrics: Sequence[str]
  num_tokens: Sequence[int]
  num_images: int
  batch_size: int
  seed: int
  grid_images: int = 4
  folder: Path | None = None


class Generation:
  """Draws samples, decodes their first tokens, and measures the images at every token count.

  Sample i is the same whatever the batch size and the devices. The last batch is padded; padding is not counted.

  Args:
    draw: sample numbers int32 [b] -> token ids int32 [b, n], num_ids after the end of a sequence.
    decode: (params, ids [b, slots], keep_k [b], numbers [b]) -> images [b, h, w, 3] in [-1, 1].
    num_ids: ids below it are tokens.
    num_registers, image_size: of the tokenizer; pixels per side.
    settings: metrics, token counts, number of samples, batch size, seed.
    networks: {"inception", "clip", "classifier"}, those that the metrics need (see make_networks).
    targets: sample numbers -> {"labels": int32 [b]} for top1 and {"texts": float32 [b, d]} for clip.
    reference: reference set; None if no metric needs it.
    mesh: devices that batches are split over.
    progress: keeps partial results.
  """

  def __init__(
    self,
    draw: Callable[[np.ndarray], jax.Array],
    decode: Callable[..., jax.Array],
    num_ids: int,
    num_registers: int,
    image_size: int,
    settings: Settings,
    networks: Mapping[str, jax.tree_util.Partial],
    targets: Callable[[np.ndarray], dict[str, np.ndarray]],
    reference: Reference | None,
    mesh: jax.sharding.Mesh,
    progress: Progress | None = None,
  ):
    self._draw, self._targets = draw, targets
    self._image_size, self._settings, self._reference = image_size, settings, reference
    self._progress = progress or Progress()
    self._mesh = mesh
    replicated = sharding.replicated(mesh)
    self._networks = batching.replicate(dict(networks), mesh)

    def restore(params, ids, numbers, count):
      slots = nested.padded_length(count, num_registers)
      keep_k = jnp.clip((ids < num_ids).sum(1), 1, count)
      ids = jnp.where(ids < num_ids, ids, 0)[:, :slots]
      ids = jnp.pad(ids, ((0, 0), (0, slots - ids.shape[1])))  # [b, slots]
      return images_lib.as_uint8(decode(params, ids, keep_k, numbers))

    self._restore = jax.jit(restore, static_argnames="count", out_shardings=sharding.batch_sharding(mesh))
    self._extract = jax.jit(self._measure, out_shardings=replicated)
    self._replicate = jax.jit(lambda x: x, out_shardings=replicated)

  def run(self, params: Any) -> Report:
    """Measures the samples; params are the tokenizer's.

    Raises:
      ValueError: a metric that is not finite, or too few samples for a metric.
    """
    s = self._settings
    size = batching.batch_rows(s.batch_size, s.num_images, self._mesh)
    done, arrays = self._progress.resume(SET, s.num_images)
    results = Accumulator(s.grid_images, arrays)
    batches = batching.slices(np.arange(s.num_images, dtype=np.int32), size, done)
    with contextlib.ExitStack() as stack:
      writers = self._open_writers(done)
      for writer in writers.values():
        stack.callback(writer.close)
      for batch in batching.map_batches(lambda numbers: self._run_batch(params, numbers), batches, size):
        start = done
        for count, (images, values, features) in zip(s.num_tokens, batch, strict=True):
          results.add(str(count), images, values, features)
          done = start + len(images)
          if count in writers:
            writers[count].write(start, images)
        self._progress.after_batch(SET, done, s.num_images, results.to_arrays)
      for writer in writers.values():
        writer.finish()
    by_tokens, intervals = {}, {}
    for column in map(str, s.num_tokens) if processes.is_process_0() else ():
      by_tokens[column], intervals[column] = self._scores(results, column)
    sets: dict[str, Any] = {SET: {"num_images": s.num_images, "by_tokens": by_tokens, "intervals": intervals}}
    notes = []
    if self._reference:
      sets[SET]["reference_images"] = self._reference.num_images
      sizes = {"samples": s.num_images, "reference images": self._reference.num_images}
      for name in ("gfid", "sfid"):
        if name in s.metrics:
          notes.append(frechet.caution(name, sizes, len(self._reference.gaussians[LAYERS[name]][0])))
    scores = {"seed": s.seed, "num_tokens": list(s.num_tokens), "sets": sets}
    return reconstruction.make_report(scores, {SET: results.examples()}, notes)

  def _open_writers(self, done: int) -> dict[int, "SampleWriter"]:
    """Returns the writers of the samples' files that are not complete, by token count."""
    s = self._settings
    if s.folder is None or not processes.is_process_0():
      return {}
    shape = (s.num_images, self._image_size, self._image_size, 3)
    paths = {count: s.folder / f"samples_{count}.npz" for count in s.num_tokens}
    return {
      count: SampleWriter(path, shape, done)
      for count, path in paths.items()
      if done < s.num_images or not path.exists()
    }

  def _run_batch(self, params: Any, numbers: np.ndarray) -> list[tuple]:
    """Returns (images uint8, values, features) of a batch of samples at every token count."""
    data = self._draw(numbers), numbers, self._targets(numbers)
    ids, numbers, targets = sharding.place(data, sharding.batch_sharding(self._mesh))
    results = []
    for count in self._settings.num_tokens:
      images = self._restore(params, ids, numbers, count=count)
      results.append((self._replicate(images), *self._extract(self._networks, images, targets)))
    return results

  def _measure(self, networks, images, targets) -> tuple[dict, dict]:
    """Returns (values kept per sample, features whose moments are kept) that the metrics need."""
    images, names = images.astype(jnp.float32) / 255, set(self._settings.metrics)
    values, features = {}, {}
    if "inception" in networks:
      found = networks["inception"](images)
      features = {LAYERS[name]: found[LAYERS[name]] for name in ("gfid", "sfid") if name in names}
      if "is" in names:
        values["logits"] = found["logits"]
      if {"precision", "recall", "fid_infinity"} & names:
        values["pool"] = found["pool"]
    if "clip" in networks:
      values["clip"] = 100 * jnp.maximum((networks["clip"](images) * targets["texts"]).sum(1), 0)
    if "classifier" in networks:
      values["top1"] = (networks["classifier"](images).argmax(1) == targets["labels"]).astype(jnp.float32)
    return values, features

  def _scores(self, results: Accumulator, column: str) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the metrics of a column, in the order of the settings, and the intervals of those that are means."""
    names, values = self._settings.metrics, results.values(column)
    scores, intervals = means_and_intervals({name: values[name] for name in ("clip", "top1") if name in values})
    if "logits" in values:
      mean, deviation = sample_metrics.inception_score(values["logits"], min(_SPLITS, len(values["logits"])))
      scores |= {"is": mean, "is_std": deviation}
    gaussians: Any = self._reference and self._reference.gaussians
    pools: Any = self._reference and self._reference.pools
    for name in ("gfid", "sfid"):
      if name in names:
        scores[name] = frechet.frechet_distance(*results.gaussian(column, LAYERS[name]), *gaussians[LAYERS[name]])
    if set(NEED_IMAGES) & set(names):
      scores["precision"], scores["recall"] = sample_metrics.precision_recall(pools, values["pool"])
    if "fid_infinity" in names:
      smallest = min(5000, len(values["pool"]) // 2)
      mu, sigma = gaussians["pool"]
      scores["fid_infinity"] = frechet.fid_infinity(values["pool"], mu, sigma, smallest=smallest).value
    ordered = [*dict.fromkeys(x for name in names for x in ((name, "is_std") if name == "is" else (name,)))]
    if not np.isfinite([scores[name] for name in ordered]).all():
      raise ValueError(f"samples at {column} tokens give a metric that is not finite: the weights diverged")
    return {name: scores[name] for name in ordered}, intervals


def make_draw(
  gen: ARGenerator, conditions: Sequence[Condition], seed: int, mesh: jax.sharding.Mesh, **choices: Any
) -> Callable[[np.ndarray], jax.Array]:
  """Returns a function from sample numbers [b] to token ids [b, n].

  Sample i has condition i modulo their number, and the key fold_in(key(seed), i).

  Args:
    conditions: all classes, all prompts, or [None].
    **choices: of gen.generate.
  """
  fold = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))

  def draw(numbers):
    chosen = [conditions[i % len(conditions)] for i in numbers]
    condition = {} if chosen[0] is None else {"prompts" if isinstance(chosen[0], str) else "labels": chosen}
    keys = fold(jax.random.key(seed), sharding.place(numbers, sharding.batch_sharding(mesh)))
    return gen.generate(keys, **condition, **choices)

  return draw


def make_networks(
  metrics: Sequence[str], weights: str | None, conditions: Sequence[Condition]
) -> tuple[dict[str, jax.tree_util.Partial], Callable[[np.ndarray], dict[str, np.ndarray]]]:
  """Returns the networks that metrics need, and a function from sample numbers to their targets, for Generation.

  Args:
    metrics: from NAMES.
    weights: folder with the weights of networks, see weights/perception/networks.py.
    conditions: as in make_draw.

  Raises:
    ValueError: a network without weights, or a metric that does not apply to these conditions.
  """
  nets, kind = {}, type(conditions[0])
  if needed := [name for name in INCEPTION if name in metrics]:
    nets["inception"] = networks.inception(weights, needed[0])
  if "top1" in metrics:
    if kind is not int:
      raise ValueError("metrics=top1 compares samples with their class: it needs a class-conditional generator")
    nets["classifier"] = networks.classifier(weights, "top1")
  texts = None
  if "clip" in metrics:
    if kind is not str:
      raise ValueError("metrics=clip compares samples with their prompts: give prompts")
    nets["clip"], encode = networks.clip(weights, "clip")
    texts = encode([str(condition) for condition in conditions])

  def targets(numbers: np.ndarray) -> dict[str, np.ndarray]:
    rows = numbers % len(conditions)
    found = {"labels": np.array([conditions[i] for i in rows], np.int32)} if kind is int else {}
    return found | ({} if texts is None else {"texts": texts[rows]})

  return nets, targets


class SampleWriter:
  """Writes samples batch by batch to PATH.part.npy, and then PATH: a .npz file with arr_0 uint8 [n, h, w, 3].

  Args:
    path: of the .npz file.
    shape: of all images, (n, h, w, 3).
    done: number of images in the .part.npy file of an interrupted run.

  Raises:
    ValueError: that file is missing or of another shape, or the path cannot be written.
  """

  def __init__(self, path: Path, shape: tuple[int, int, int, int], done: int = 0):
    self._path, self._part = path, path.with_suffix(".part.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      self._file = files.open_regular(self._part)
      files.lock(self._file)
      if done:
        self._images = np.lib.format.open_memmap(self._part, mode="r+")
      else:
        self._images = np.lib.format.open_memmap(self._part, mode="w+", dtype=np.uint8, shape=shape)
    except BlockingIOError:
      raise ValueError(f"another run writes {self._part}: stop it, or write to another folder") from None
    except (OSError, ValueError) as e:
      raise ValueError(
        f"cannot {'resume' if done else 'write'} {self._part} ({e}): write to another folder to start over"
      ) from None
    if self._images.shape != shape or self._images.dtype != np.uint8:
      raise ValueError(f"{self._part} does not hold {shape[0]} such samples: remove it to start over")

  def write(self, start: int, images: np.ndarray):
    """Writes images uint8 [b, h, w, 3] at rows `start` and following; they are on disk when this returns."""
    self._images[start : start + len(images)] = images
    self._images.flush()

  def finish(self):
    """Writes the .npz file atomically, and removes the .part.npy file."""
    files.clear_leftovers(self._path.parent, [self._path.name])
    with files.replacing(self._path) as temporary, open(temporary, "wb") as file:
      np.savez(file, arr_0=self._images)
    self._part.unlink()
    self.close()

  def close(self):
    """Lets other runs write the samples."""
    self._file.close()
