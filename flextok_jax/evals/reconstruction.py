"""Reconstruction quality against the number of tokens: encode once, decode at every token count, compare."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flextok_jax.core import images as images_lib
from flextok_jax.evals import charts, grids
from flextok_jax.evals.accumulator import ORIGINAL, Accumulator, means_and_intervals
from flextok_jax.evals.metrics import frechet
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report, Table
from flextok_jax.inference.decoding import decoder_by_image, token_counts
from flextok_jax.ops import nested
from flextok_jax.parallel import batching, sharding

VAE_COLUMN = "vae"  # the only column of a stage without tokens
RFID = "rfid"


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a reconstruction evaluation.

  Attributes:
    num_tokens: token counts to decode from, at least one; unused by a stage without tokens.
    batch_size: images per batch, at most.
    seed: of the noise.
    grid_images: images per set kept as examples.
  """

  num_tokens: Sequence[int]
  batch_size: int
  seed: int
  grid_images: int = 4


class Reconstruction:
  """Measures reconstructions of fixed image sets by the predict functions of a stage.

  Image i of a set is decoded from the same noise at every token count, whatever the batch size. Batches are padded to
  one size, so one compilation serves all sets and all token counts that need the same number of slots.

  Args:
    predict_fns: {"tokenize", "detokenize"} or {"reconstruct"} (see flextok_jax/stages).
    eval_sets: {name: uint8 [n, h, w, 3]}; images are only sliced, so they may be read as needed. A set of images of
      several sizes is a list of (their numbers int32 [n], images of one size).
    settings: token counts, batch size, seed, number of examples.
    mesh: devices that batches are split over; None: the default device.
    metrics: per-image metrics by name (evals/metrics/image.py); None: PSNR, SSIM and MAE.
    features: for rFID: images [b, h, w, 3] in [0, 1] -> {"pool": [b, d]}, a pytree as metrics are; None: no rFID.
    progress: keeps partial results.

  Raises:
    ValueError: no sets, an empty set, images too small for the metrics, or a seed out of range.
  """

  def __init__(
    self,
    predict_fns: Mapping[str, Callable],
    eval_sets: Mapping[str, Any],
    settings: Settings,
    mesh: jax.sharding.Mesh | None = None,
    metrics: Mapping[str, metrics_lib.Metric] | None = None,
    features: metrics_lib.Metric | None = None,
    progress: Progress | None = None,
  ):
    self._metrics = metrics_lib.make_metrics(metrics_lib.METRICS) if metrics is None else dict(metrics)
    if not eval_sets:
      raise ValueError("no evaluation set is named: set eval.sources")
    self._parts: dict[str, list[tuple[np.ndarray, Any]]] = {
      name: images if isinstance(images, list) else [(np.arange(images.shape[0], dtype=np.int32), images)]
      for name, images in eval_sets.items()
    }
    for name, parts in self._parts.items():
      for _, images in parts:
        shape = images.shape
        if not shape[0]:
          raise ValueError(f"evaluation set {name!r} has no images")
        if "ssim" in self._metrics and min(shape[1:3]) < metrics_lib.SSIM_WINDOW:
          raise ValueError(
            f"evaluation set {name!r}: images of {shape[1]}x{shape[2]} px are smaller than SSIM's window"
            f" of {metrics_lib.SSIM_WINDOW}x{metrics_lib.SSIM_WINDOW}"
          )
    self.images = dict(eval_sets)
    self._settings = settings
    largest = max(images.shape[0] for parts in self._parts.values() for _, images in parts)
    self._batch_size = batching.batch_rows(settings.batch_size, largest, mesh)
    self._has_tokens = "tokenize" in predict_fns
    self._mesh = mesh
    self._features = features
    self._progress = progress or Progress()
    self._networks: Any = None  # metrics and features, on the devices

    self._columns = [ORIGINAL] if features is not None else []
    if self._has_tokens:
      self._counts = sorted(set(settings.num_tokens))
      self._columns += map(str, self._counts)
      detokenize = decoder_by_image(predict_fns["detokenize"], settings.seed)
    else:
      self._columns.append(VAE_COLUMN)

    def extract(features, images):
      return {} if features is None else {"pool": features(images)["pool"]}

    def compare(networks, images, restored):
      metrics, features = networks
      restored = images_lib.round_to_8bit(restored)
      originals = images.astype(jnp.float32) / 255
      values = {name: metric(originals, restored) for name, metric in metrics.items()}
      return images_lib.to_uint8(restored), values, extract(features, restored)

    def decode(params, networks, images, ids, num_tokens, index):
      keep_k = jnp.full(len(images), num_tokens)
      return compare(networks, images, detokenize(params, ids, keep_k, index, images.shape[1:3]))

    def reconstruct(params, networks, images):
      return compare(networks, images, predict_fns["reconstruct"](params, images))

    # Results are small and read on every host: replicated.
    jit = functools.partial(jax.jit, out_shardings=None if mesh is None else sharding.replicated(mesh))
    self._extract = jit(lambda features, images: (None, {}, extract(features, images.astype(jnp.float32) / 255)))
    if self._has_tokens:
      self._tokenize = jax.jit(predict_fns["tokenize"])
      self._decode = jit(decode)
    else:
      self._reconstruct = jit(reconstruct)

  def run(self, params: Any) -> Report:
    """Evaluates params, the full tree that the predict functions take.

    The scores of the report are {"seed", "num_tokens", "sets": {set: {"num_images": n, "by_tokens": {column:
    {"psnr", ...}}, "intervals": {column: {"psnr": [low, high], ...}}}}}. A column is a token count as a string ("1",
    "2", ...), or "vae"; a metric is the mean over the n images (8-bit, evals/metrics/image.py) with the 95% interval of
    that mean by bootstrap, or one number for the whole set (rfid). A set of images of several sizes also has "sizes":
    {"16x32": images, ...}, height first.

    Raises:
      ValueError: a token count that the model does not take, or a metric that is not finite.
    """
    if self._networks is None:
      networks = self._metrics, self._features
      self._networks = networks if self._mesh is None else batching.replicate(networks, self._mesh)
    sets, examples, notes = {}, {}, []
    for name, parts in self._parts.items():
      count = sum(len(numbers) for numbers, _ in parts)
      results = self._run_set(params, name, parts)
      means, intervals = {}, {}
      for column in results.columns:
        values = results.values(column)
        values = {name: values[name] for name in self._metrics if name in values}  # compiled functions sort them
        means[column], intervals[column] = means_and_intervals(values)
        if not np.isfinite(list(means[column].values())).all():
          raise ValueError(f"reconstructions of {name!r} at {column} tokens are not finite: these weights diverged")
        if self._features is not None:
          gaussians = results.gaussian(column, "pool"), results.gaussian(ORIGINAL, "pool")
          means[column][RFID] = frechet.frechet_distance(*gaussians[0], *gaussians[1])
      sets[name] = {"num_images": count, "by_tokens": means, "intervals": intervals}
      if isinstance(self.images[name], list):
        sets[name]["sizes"] = {f"{x.shape[1]}x{x.shape[2]}": x.shape[0] for _, x in parts}
      if self._features is not None:
        sizes = {"reconstructions": count, "originals": count}
        sets[name]["reference_images"] = count
        notes.append(frechet.caution(f"rFID on {name}", sizes, len(gaussians[0][0])))
      shown = results.examples()
      examples[name] = {"original": self._originals(parts), **shown}
    num_tokens = [int(column) for column in means] if self._has_tokens else []
    return make_report({"seed": self._settings.seed, "num_tokens": num_tokens, "sets": sets}, examples, notes)

  def _originals(self, parts: Sequence[tuple[np.ndarray, Any]]) -> np.ndarray:
    """Returns the first images of a set, uint8 [n, h, w, 3], padded to one size."""
    found: list[np.ndarray] = []
    for _, images in parts:
      missing = self._settings.grid_images - sum(map(len, found))
      if missing > 0 or not found:
        found.append(images[:missing])
    return images_lib.pad_together(found)

  def _run_set(self, params: Any, name: str, parts: Sequence[tuple[np.ndarray, Any]]) -> Accumulator:
    """Returns the accumulated results of all images of a set, in the order of its parts."""
    total, size = sum(len(numbers) for numbers, _ in parts), self._batch_size
    done, arrays = self._progress.resume(name, total)
    results = Accumulator(self._settings.grid_images, arrays)
    starts = np.cumsum([0, *(len(numbers) for numbers, _ in parts)])
    batches = itertools.chain.from_iterable(
      batching.slices((images, numbers), size, max(done - int(start), 0))
      for start, (numbers, images) in zip(starts, parts)
    )
    for batch in batching.map_batches(functools.partial(self._run_batch, params), batches, size, self._mesh):
      for column, values in zip(self._columns, batch, strict=True):
        results.add(column, *values)
      done += len(jax.tree.leaves(batch)[0])
      self._progress.after_batch(name, done, total, results.to_arrays)
    return results

  def _run_batch(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> list[tuple]:
    """Returns (uint8 images, metrics, features) for each column, from a batch of images and their numbers."""
    images, index = batch
    results = [] if self._features is None else [self._extract(self._networks[1], images)]
    if self._has_tokens:
      ids = self._tokenize(params, images)  # [b, num_registers]
      total = ids.shape[1]
      for count in token_counts(self._counts, total):
        kept = ids[:, : nested.padded_length(count, total)]
        results.append(self._decode(params, self._networks, images, kept, np.int32(count), index))
    else:
      results.append(self._reconstruct(params, self._networks, images))
    return results


def make_report(
  scores: dict[str, Any], examples: Mapping[str, Mapping[str, np.ndarray]], notes: Sequence[str] = ()
) -> Report:
  """Returns the report of scores by set and column, and of examples {set: {"original": ..., column: ...}}.

  Its pictures are curve.png, if there are token counts, and grid_<set>.png; its scalars "eval/<set>/<metric>_<column>".
  """
  scalars = {
    f"eval/{name}/{metric}_{column}": value
    for name, scored in scores["sets"].items()
    for column, values in scored["by_tokens"].items()
    for metric, value in values.items()
  }
  pictures: dict[str, Callable[[], bytes | Image.Image]] = {}
  if scores["num_tokens"]:
    pictures["curve.png"] = functools.partial(draw_curves, scores["sets"])
  pictures |= {f"grid_{name}.png": functools.partial(draw_grid, columns) for name, columns in examples.items()}
  notes = [note for note in notes if note]
  scores = {**scores, "notes": notes} if notes else scores
  return Report(scores, make_tables(scores["sets"]), pictures, scalars, examples, notes)


def make_tables(sets: Mapping[str, Mapping[str, Any]]) -> list[Table]:
  """Returns a table per set: a row per token count, a column per metric."""
  tables = []
  for name, scored in sets.items():
    metrics = list(next(iter(scored["by_tokens"].values()), ()))
    rows = [
      [column, *(metrics_lib.to_text(metric, value) for metric, value in row.items())]
      for column, row in scored["by_tokens"].items()
    ]
    columns = ["tokens", *(metrics_lib.title(metric) for metric in metrics)]
    title = f"{name}, {scored['num_images']} images"
    if "reference_images" in scored:
      title += f", compared with {scored['reference_images'] or 'an unknown number'}"
    tables.append(Table(title, columns, rows))
  return tables


def fit_log_linear(counts: Sequence[int], values: Sequence[float]) -> tuple[float, float, float]:
  """Fits value = intercept + slope * log2(count) by least squares.

  Returns:
    (slope, intercept, share of the variance of the values that the fit explains).

  Raises:
    ValueError: fewer than two different counts.
  """
  if len(set(counts)) < 2:
    raise ValueError(f"a line needs two different token counts, got {list(counts)}")
  x, y = np.log2(counts), np.asarray(values, np.float64)
  slope, intercept = np.polyfit(x, y, 1)
  residual, total = np.square(y - intercept - slope * x).sum(), np.square(y - y.mean()).sum()
  return float(slope), float(intercept), float(1 - residual / total) if total else 1.0


def draw_curves(sets: Mapping[str, Mapping[str, Any]]) -> bytes:
  """Draws every metric and its intervals over the number of tokens (log scale), one line and its fit per set."""
  panels: dict[str, dict[str, charts.Line]] = {}
  ticks = set()
  for i, (name, scored) in enumerate(sets.items()):
    counts = [int(column) for column in scored["by_tokens"]]
    ticks.update(counts)
    for metric in next(iter(scored["by_tokens"].values())):
      points = [
        [row[metric], *scored["intervals"][column].get(metric, ())] for column, row in scored["by_tokens"].items()
      ]
      panel = panels.setdefault(metrics_lib.title(metric), {})
      panel[name] = charts.Line(counts, points, color=i)
      if len(counts) > 2:
        slope, intercept, _ = fit_log_linear(counts, [point[0] for point in points])
        fit = [intercept + slope * float(np.log2(count)) for count in counts]
        panel[f"_{name}, fit"] = charts.Line(counts, fit, color=i, dashed=True, marked=False)
  return charts.curves(panels, "tokens", sorted(ticks))


def draw_grid(columns: Mapping[str, np.ndarray]) -> Image.Image:
  """Draws examples {column: uint8 [n, h, w, 3]}, one row per image."""
  labels = [grids.column_label(column, last=column == list(columns)[-1]) for column in columns]
  return grids.grid(list(columns.values()), labels)
