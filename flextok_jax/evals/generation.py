"""Samples of a generator, by the metrics of the field: gFID, sFID, inception score, precision, recall, CLIP, top-1."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core import images as images_lib
from flextok_jax.evals import tally
from flextok_jax.evals.metrics import frechet as statistics
from flextok_jax.evals.metrics import samples as sample_metrics
from flextok_jax.evals.metrics.reference import Reference
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.reconstruction import Report
from flextok_jax.evals.sample_writer import SampleWriter
from flextok_jax.ops import nested
from flextok_jax.parallel import processes, sharding

INCEPTION = ("gfid", "sfid", "is", "precision", "recall", "fid_infinity")  # by Inception's features
NAMES = (*INCEPTION, "clip", "top1")
NEED_REFERENCE = ("gfid", "sfid", "precision", "recall", "fid_infinity")
NEED_IMAGES = ("precision", "recall")  # of the reference
SET = "samples"
_SPLITS = 10  # of the inception score


class Generation:
  """Draws samples, decodes them from their first tokens, and measures them at every token count.

  Sample i is the same whatever the batch size and the devices; its condition is number i modulo their count. The last
  batch is padded, and its padding counted nowhere.

  Args:
    draw: rows int32 [b], numbers of samples -> token ids int32 [b, n], num_ids where a sequence has ended.
    decode: (params, ids [b, slots], keep_k [b], rows [b]) -> images [b, h, w, 3] in [-1, 1].
    num_ids: ids below it are tokens.
    num_registers: of the tokenizer.
    image_size: pixels a side.
    columns: token counts.
    names: metrics, of NAMES.
    networks: {"inception", "clip", "classifier"}, those that the metrics need (weights/perception/networks.py).
    facts: rows -> {"labels": int32 [b]} for top1 and {"texts": float32 [b, d]} for clip.
    reference: what samples are compared with; None where no metric needs it.
    mesh: the devices.
    progress: what is kept on the way.
    samples: folder for samples_<count>.npz, arr_0 uint8 [n, h, w, 3]; None: not written.
  """

  def __init__(
    self,
    draw: Callable[[np.ndarray], jax.Array],
    decode: Callable[..., jax.Array],
    num_ids: int,
    num_registers: int,
    image_size: int,
    columns: Sequence[int],
    names: Sequence[str],
    networks: Mapping[str, jax.tree_util.Partial],
    facts: Callable[[np.ndarray], dict[str, np.ndarray]],
    reference: Reference | None,
    mesh: jax.sharding.Mesh,
    progress: Progress | None = None,
    samples: Path | None = None,
  ):
    self._draw, self._facts, self._columns = draw, facts, tuple(columns)
    self._names, self._reference = tuple(names), reference
    self._samples, self._image_size = samples, image_size
    self._progress = progress or Progress()
    self._placed, self._devices = sharding.batch_sharding(mesh), mesh.size
    replicated = sharding.replicated(mesh)
    self._networks = sharding.place(dict(networks), replicated)

    def picture(params, ids, rows, count):
      keep_k = jnp.clip((ids < num_ids).sum(1), 1, count)
      ids = jnp.where(ids < num_ids, ids, 0)[:, : nested.padded_length(count, num_registers)]
      ids = jnp.pad(ids, ((0, 0), (0, nested.padded_length(count, num_registers) - ids.shape[1])))
      return images_lib.to_uint8(images_lib.round_to_8bit(decode(params, ids, keep_k, rows)))

    self._picture = jax.jit(picture, static_argnames="count", out_shardings=self._placed)
    self._look = jax.jit(self._features, out_shardings=replicated)
    self._replicate = jax.jit(lambda x: x, out_shardings=replicated)

  def run(self, params: Any, num_images: int, batch_size: int, seed: int, grid_images: int = 4) -> Report:
    """Measures num_images samples; params are the tokenizer's.

    Raises:
      ValueError: a metric that is not finite, or that so few samples do not give.
    """
    batch_size = -(-min(batch_size, num_images) // self._devices) * self._devices
    first, arrays = self._progress.load(SET)
    seen = tally.Tally(grid_images, arrays)
    writers = {}
    if self._samples is not None and processes.is_process_0():
      shape = (num_images, self._image_size, self._image_size, 3)
      paths = {column: self._samples / f"samples_{column}.npz" for column in self._columns}
      left = {column: path for column, path in paths.items() if first < num_images or not path.exists()}
      writers = {column: SampleWriter(path, shape, first) for column, path in left.items()}
    for start in range(first, num_images, batch_size):
      rows = np.minimum(np.arange(start, start + batch_size), num_images - 1).astype(np.int32)
      count = min(batch_size, num_images - start)
      for column, pictures, values, features in self._batch(params, rows):
        seen.add(str(column), count, pictures, values, features)
        if column in writers:
          writers[column].write(start, pictures[:count])
      self._progress.after_batch(SET, start + count, num_images, seen.to_arrays)
    for writer in writers.values():
      writer.finish()
    by_tokens, intervals = {}, {}
    for column in map(str, self._columns) if processes.is_process_0() else ():
      by_tokens[column], intervals[column] = self._scores(seen, column)
    scored = {"num_images": num_images, "by_tokens": by_tokens, "intervals": intervals}
    return Report({"seed": seed, "num_tokens": list(self._columns), "sets": {SET: scored}}, {SET: seen.pictures()})

  def _batch(self, params: Any, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, dict, dict]]:
    """Yields (count, pictures uint8, values, features) of a batch at every token count."""
    ids = self._draw(rows)
    ids, placed, facts = sharding.place((ids, rows, self._facts(rows)), self._placed)
    for column in self._columns:
      pictures = self._picture(params, ids, placed, count=column)
      values, features = self._look(self._networks, pictures, facts)
      yield column, *jax.device_get((self._replicate(pictures), values, features))

  def _features(self, networks, pictures, facts) -> tuple[dict, dict]:
    images, values, features = pictures.astype(jnp.float32) / 255, {}, {}
    if "inception" in networks:
      found = networks["inception"](images)
      features = {layer: found[layer] for name, layer in (("gfid", "pool"), ("sfid", "spatial")) if name in self._names}
      if "is" in self._names:
        values["logits"] = found["logits"]
      if {"precision", "recall", "fid_infinity"} & set(self._names):
        values["pool"] = found["pool"]
    if "clip" in networks:
      values["clip"] = 100 * jnp.maximum((networks["clip"](images) * facts["texts"]).sum(1), 0)
    if "classifier" in networks:
      values["top1"] = (networks["classifier"](images).argmax(1) == facts["labels"]).astype(jnp.float32)
    return values, features

  def _scores(self, seen: tally.Tally, column: str) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the metrics of a column in the order asked for, and the intervals of those that are means."""
    values = seen.values(column)
    singles = {name: values[name] for name in ("clip", "top1") if name in values}
    scores, intervals = tally.means_and_intervals(singles)
    if "logits" in values:
      mean, deviation = sample_metrics.inception_score(values["logits"], min(_SPLITS, len(values["logits"])))
      scores |= {"is": mean, "is_std": deviation}
    for name, layer in (("gfid", "pool"), ("sfid", "spatial")):
      if name in self._names:
        scores[name] = statistics.frechet_distance(*seen.gaussian(column, layer), *self._reference.gaussians[layer])
    if set(NEED_IMAGES) & set(self._names):
      scores["precision"], scores["recall"] = sample_metrics.precision_recall(self._reference.pools, values["pool"])
    if "fid_infinity" in self._names:
      smallest = min(5000, len(values["pool"]) // 2)
      found = statistics.fid_infinity(values["pool"], *self._reference.gaussians["pool"], smallest=smallest)
      scores["fid_infinity"] = found.value
    wanted = [*dict.fromkeys(x for name in self._names for x in ((name, "is_std") if name == "is" else (name,)))]
    if not np.isfinite([scores[name] for name in wanted]).all():
      raise ValueError(f"samples at {column} tokens give a metric that is not finite: the weights diverged")
    return {name: scores[name] for name in wanted}, intervals
