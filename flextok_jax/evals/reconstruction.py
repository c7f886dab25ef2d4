"""Reconstruction quality against the number of tokens: encode once, decode at every token count, compare."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.evals import figures, plots, tally
from flextok_jax.evals.metrics import frechet as statistics
from flextok_jax.evals.metrics import image as metrics
from flextok_jax.evals.metrics import measures as measures_lib
from flextok_jax.evals.progress import Progress
from flextok_jax.inference.decoding import decoder_by_image, token_counts
from flextok_jax.ops import nested
from flextok_jax.parallel.sharding import place

VAE_COLUMN = "vae"  # the one column of a stage without tokens


@dataclasses.dataclass(frozen=True)
class Report:
  """What one evaluation measured.

  scores is JSON-able: {"seed", "num_tokens", "sets": {set: {"num_images": n, "by_tokens": {column: {"psnr", ...}},
  "intervals": {column: {"psnr": [low, high], ...}}}}}. A column is a token count as a string ("1", "2", ...), or "vae";
  a metric is the mean over the n images (evals/metrics/measures.py: 8-bit images) with the 95% interval of that mean by
  bootstrap, or one number of all of them (rfid).
  examples holds the first images of each set, uint8 [g, h, w, 3]: {set: {"original": ..., column: ...}}.
  """

  scores: dict[str, Any]
  examples: dict[str, dict[str, np.ndarray]]

  def scalars(self) -> dict[str, float]:
    """Returns flat numbers for a metric writer: "eval/<set>/<metric>_<column>"."""
    return {
      f"eval/{name}/{metric}_{column}": value
      for name, scored in self.scores["sets"].items()
      for column, values in scored["by_tokens"].items()
      for metric, value in values.items()
    }

  def table(self) -> str:
    """Returns the scores as text, a block a set and a line a token count."""
    blocks = []
    for name, scored in self.scores["sets"].items():
      named = next(iter(scored["by_tokens"].values()))
      titles = [measures_lib.UNITS.get(metric, metric) for metric in named]
      lines = [f"{name}, {scored['num_images']} images", " ".join([f"{'tokens':>8}", *(f"{t:>9}" for t in titles)])]
      for column, row in scored["by_tokens"].items():
        numbers = (f"{value:9.{measures_lib.DECIMALS.get(metric, 4)}f}" for metric, value in row.items())
        lines.append(" ".join([f"{column:>8}", *numbers]))
      blocks.append("\n".join(lines))
    return "\n\n".join(blocks)

  def write(self, out_dir: str | Path, settings: Mapping[str, Any] | None = None) -> list[Path]:
    """Writes report.json (settings and scores), curve.png (where there are token counts) and grid_<set>.png.

    Returns:
      The paths written.
    """
    out_dir = Path(out_dir)
    paths = [out_dir / "report.json"]
    files.write_file(paths[0], (json.dumps({**(settings or {}), **self.scores}, indent=2) + "\n").encode())
    if self.scores["num_tokens"]:
      paths.append(out_dir / "curve.png")
      files.write_file(paths[-1], curves_png(self.scores["sets"]))
    for name, columns in self.examples.items():
      labels = [plots.column_label(column, last=column == list(columns)[-1]) for column in columns]
      paths.append(out_dir / f"grid_{name}.png")
      files.write_file(paths[-1], plots.to_png(plots.grid(list(columns.values()), labels)))
    return paths


def curves_png(sets: Mapping[str, Mapping[str, Any]]) -> bytes:
  """Draws every metric and its intervals over the number of tokens (log scale), a line a set; see Report.scores."""
  panels, ticks = {}, set()
  for name, scored in sets.items():
    counts = [int(column) for column in scored["by_tokens"]]
    ticks.update(counts)
    for metric in next(iter(scored["by_tokens"].values())):
      points = [
        [row[metric], *scored["intervals"][column].get(metric, ())] for column, row in scored["by_tokens"].items()
      ]
      line = figures.Line(counts, points)
      panels.setdefault(measures_lib.UNITS.get(metric, metric), {})[name] = line
  return figures.curves(panels, "tokens", sorted(ticks))


class Reconstruction:
  """Measures reconstructions of fixed image sets by the predict functions of a stage.

  Image i of a set is decoded from the same noise at every token count, whatever the batch size. The last batch is
  padded and its padding left out of all numbers: one compilation serves all sets and all token counts of a slot size.

  Args:
    predict_fns: {"tokenize", "detokenize"} or {"reconstruct"} (see flextok_jax/stages).
    eval_sets: {name: uint8 [n, h, w, 3]}; images are taken by slices, so they may be read only then.
    num_tokens: token counts to decode from (see token_counts); without meaning for "reconstruct".
    batch_size: images at once; lowered to the largest set.
    seed: of the noise.
    grid_images: images a set kept as examples.
    sharding: places batches over the devices of a mesh along their first axis; None: the default device.
    measures: per-image metrics by name (evals/metrics/measures.py); None: PSNR, SSIM and MAE.
    features: for rFID: images [b, h, w, 3] in [0, 1] -> {"pool": [b, d]}, a pytree as measures are; None: no rFID.
    progress: what is kept on the way.

  Raises:
    ValueError: no sets, an empty set, or images too small for the metrics.
  """

  def __init__(
    self,
    predict_fns: Mapping[str, Callable],
    eval_sets: Mapping[str, Any],
    num_tokens: Sequence[int],
    batch_size: int,
    seed: int,
    grid_images: int = 4,
    sharding: jax.sharding.NamedSharding | None = None,
    measures: Mapping[str, measures_lib.Measure] | None = None,
    features: measures_lib.Measure | None = None,
    progress: Progress | None = None,
  ):
    self._measures = measures_lib.make(metrics.METRICS) if measures is None else dict(measures)
    if not eval_sets:
      raise ValueError("no evaluation set is named: set eval.sources")
    for name, images in eval_sets.items():
      shape = images.shape
      if not shape[0]:
        raise ValueError(f"evaluation set {name!r} has no images")
      if "ssim" in self._measures and min(shape[1:3]) < metrics.SSIM_WINDOW:
        raise ValueError(
          f"evaluation set {name!r}: images of {shape[1]}x{shape[2]} px are smaller than SSIM's window"
          f" of {metrics.SSIM_WINDOW}x{metrics.SSIM_WINDOW}"
        )
    self.images = dict(eval_sets)
    self._has_tokens = "tokenize" in predict_fns
    self._num_tokens = tuple(num_tokens)
    devices = sharding.num_devices if sharding else 1
    batch_size = min(batch_size, max(images.shape[0] for images in self.images.values()))
    self._batch_size = -(-batch_size // devices) * devices
    self._seed = seed
    self._grid_images = grid_images
    self._sharding = sharding
    self._features = features
    self._progress = progress or Progress()
    self._placed = None  # measures and features, on the devices

    if self._has_tokens:
      detokenize = decoder_by_image(predict_fns["detokenize"], seed)

    def look(features, images):
      return {} if features is None else {"pool": features(images)["pool"]}

    def compare(nets, images, restored):
      measures, features = nets
      restored = images_lib.round_to_8bit(restored)
      originals = images.astype(jnp.float32) / 255
      scores = {name: measure(originals, restored) for name, measure in measures.items()}
      return images_lib.to_uint8(restored), scores, look(features, restored)

    def decode(params, nets, images, ids, num_tokens, index):
      keep_k = jnp.full(len(images), num_tokens)
      return compare(nets, images, detokenize(params, ids, keep_k, index))

    def reconstruct(params, nets, images):
      return compare(nets, images, predict_fns["reconstruct"](params, images))

    # Results are small and read on every host: replicated.
    replicated = jax.NamedSharding(sharding.mesh, jax.P()) if sharding else None
    self._replicated = replicated
    self._look = jax.jit(lambda f, images: look(f, images.astype(jnp.float32) / 255), out_shardings=replicated)
    if self._has_tokens:
      self._tokenize = jax.jit(predict_fns["tokenize"])
      self._decode = jax.jit(decode, out_shardings=replicated)
    else:
      self._reconstruct = jax.jit(reconstruct, out_shardings=replicated)

  def run(self, params: Any) -> Report:
    """Evaluates params, the full tree that the predict functions take.

    Raises:
      ValueError: a token count that the model does not take, or a metric that is not finite.
    """
    if self._placed is None:
      self._placed = place((self._measures, self._features), self._replicated)
    sets, examples = {}, {}
    for name, images in self.images.items():
      seen = self._run_set(params, name, images)
      means, intervals = {}, {}
      for column in seen.columns:
        values = seen.values(column)
        values = {name: values[name] for name in self._measures if name in values}  # compiled functions sort them
        means[column], intervals[column] = tally.means_and_intervals(values)
        if not np.isfinite(list(means[column].values())).all():
          raise ValueError(f"reconstructions of {name!r} at {column} tokens are not finite: these weights diverged")
        if self._features is not None:
          means[column]["rfid"] = statistics.frechet_distance(
            *seen.gaussian(column, "pool"), *seen.gaussian(tally.ORIGINAL, "pool")
          )
      sets[name] = {"num_images": images.shape[0], "by_tokens": means, "intervals": intervals}
      examples[name] = {"original": images[: self._grid_images], **seen.pictures()}
    num_tokens = [int(column) for column in means] if self._has_tokens else []
    return Report({"seed": self._seed, "num_tokens": num_tokens, "sets": sets}, examples)

  def _run_set(self, params: Any, name: str, images) -> tally.Tally:
    """Returns what all images of a set have given."""
    total = images.shape[0]
    first, arrays = self._progress.load(name)
    seen = tally.Tally(self._grid_images, arrays)
    waiting = None  # a batch whose results are still being computed
    for start in [*range(first, total, self._batch_size), None]:
      begun = None if start is None else list(self._run_batch(params, images[start : start + self._batch_size], start))
      if waiting is not None:
        done = min(waiting[0] + self._batch_size, total)
        for column, results in waiting[1]:
          seen.add(column, done - waiting[0], *jax.device_get(results))
        self._progress.after_batch(name, done, total, seen.to_arrays)
      waiting = start, begun
    return seen

  def _run_batch(self, params: Any, rows: np.ndarray, start: int):
    """Yields (column, (uint8 pictures, metrics, features)) of a batch whose first row is image `start` of its set."""
    padding = self._batch_size - len(rows)
    batch = place(np.pad(rows, ((0, padding), (0, 0), (0, 0), (0, 0)), mode="edge"), self._sharding)
    if self._features is not None:
      yield tally.ORIGINAL, (None, {}, self._look(self._placed[1], batch))
    if not self._has_tokens:
      yield VAE_COLUMN, self._reconstruct(params, self._placed, batch)
      return
    ids = self._tokenize(params, batch)
    index = place(np.arange(start, start + self._batch_size, dtype=np.int32), self._sharding)
    total = ids.shape[1]
    for count in token_counts(self._num_tokens, total):
      kept = ids[:, : nested.padded_length(count, total)]
      yield str(count), self._decode(params, self._placed, batch, kept, np.int32(count), index)
