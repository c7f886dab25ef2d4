"""The study of adaptive length: quality at the lengths that thresholds choose, and lengths against the content."""

from collections.abc import Callable, Mapping, Sequence
import functools

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont
import scipy.stats

from flextok_jax.evals import charts, grids
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.metrics.samples import mean_with_interval
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report, Table, make_study_report
from flextok_jax.evals.studies.subject import Subject
from flextok_jax.inference import adaptive
from flextok_jax.parallel.batching import Batched

NAME = "halting"
_ABOUT = (
  "Every image takes the fewest tokens whose reconstruction is within a threshold. Shown is the mean over images"
  " against their mean length (solid), and at the same length for all images (dashed); bars are 95% intervals of the"
  " mean. One threshold for all makes the images equally good, which need not maximise the mean. If the number of"
  " objects in a scene is known, the mean length is shown against it. Images of the grid show their length, and have a"
  " frame if even all tokens are not within the threshold."
)


def make_lengths(subject: Subject, metric: str) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
  """Makes the function that chooses lengths by adaptive.shortest_prefix, with the same noise for all images.

  Args:
    metric: name of a metric of the subject; if higher is better, a threshold is the lowest acceptable value.

  Returns:
    (images uint8 [n, h, w, 3], ids int [n, l], threshold) -> (lengths int32 [n], metric of each prefix float32 [n]).
  """
  sign = -1 if metric in metrics_lib.HIGHER_IS_BETTER else 1
  decode_by_image = subject.decode_by_image({})
  num_registers = subject.config.tokens.num_registers

  def choose(params_and_metric, images, ids, threshold):
    params, metric = params_and_metric
    distance = lambda a, b: sign * metric((a + 1) / 2, (b + 1) / 2)

    def decode(ids, keep_k):
      ids = adaptive.pad_to_slots(ids, num_registers)
      return decode_by_image(params, ids, keep_k, jnp.zeros(len(ids), jnp.int32))

    return adaptive.shortest_prefix(decode, distance, images, ids, threshold)

  params_and_metric = subject.params, subject.metrics[metric]
  batched = Batched(choose, params_and_metric, subject.config.eval.batch_size, subject.mesh, "lengths chosen")

  def lengths(images, ids, threshold: float):
    chosen, reached = batched(images, ids, np.full(len(ids), sign * threshold, np.float32))
    return chosen, sign * reached

  return lengths


def by_objects(num_objects: np.ndarray, lengths: np.ndarray) -> dict[int, tuple[int, list[float]]]:
  """Returns {number of objects: (scenes, [mean length, low, high])}; an unknown number is -1 and left out."""
  counts = np.unique(num_objects[num_objects >= 0]).tolist()
  chosen = {count: lengths[num_objects == count] for count in counts}
  return {count: (len(x), mean_with_interval(x)) for count, x in chosen.items()}


def rank_correlation(num_objects: np.ndarray, lengths: np.ndarray) -> tuple[float | None, float | None]:
  """Returns (Spearman's rank correlation of lengths and known numbers of objects, p); None if either is constant."""
  lengths, num_objects = lengths[num_objects >= 0], num_objects[num_objects >= 0]
  if not len(lengths) or not np.ptp(lengths) or not np.ptp(num_objects):
    return None, None
  rho, p = scipy.stats.spearmanr(num_objects, lengths)
  return float(rho), float(p)


def study(progress: Progress, subject: Subject, metric: str, thresholds: Sequence[float]) -> Report:
  """Compares adaptive lengths with fixed ones. All images are decoded from noise 0, by which lengths are chosen.

  Args:
    progress: keeps partial results.
    metric: of the thresholds, one of the subject's.
    thresholds: (): for each set, the mean over its images at each fixed length.
  """
  counts, num_examples = subject.counts, subject.config.eval.grid_images
  higher = metric in metrics_lib.HIGHER_IS_BETTER
  lengths = functools.cache(functools.partial(make_lengths, subject, metric))  # compiled only if needed

  def restore(name: str, chosen: np.ndarray):
    images, ids = subject.encoded(name)
    restored = subject.decode(ids[:, : chosen.max()], chosen, np.zeros(len(ids)))
    means = {k: mean_with_interval(v) for k, v in subject.compare(images, restored).items()}
    examples = {"original": images[:num_examples], "restored": restored[:num_examples]}
    return {"num_images": len(ids), "means": means}, examples

  def fixed(name: str, count: int):
    return restore(name, np.full(len(subject.encoded(name)[1]), count))

  def adapted(name: str, threshold: float):
    chosen, reached = lengths()(*subject.encoded(name), threshold)
    values, examples = restore(name, chosen)
    within = reached >= threshold if higher else reached <= threshold
    arrays = {"lengths": chosen, "within": within, "num_objects": subject.sets[name]["num_objects"]}
    return values | {"length": mean_with_interval(chosen)}, examples | arrays

  tables = []
  panels: dict[str, dict[str, charts.Line]] = {}
  pictures, by_content = {}, {}
  for i, name in enumerate(subject.config.eval.sources):
    settings = subject.settings_of([name])
    plain = [
      progress.compute(f"{NAME}_{name}_fixed_{count}", settings, functools.partial(fixed, name, count))[0]
      for count in counts
    ]
    tried = sorted(thresholds or {float(f"{row['means'][metric][0]:.4g}") for row in plain})
    results = [
      progress.compute(
        f"{NAME}_{name}_{metric}_{threshold:g}",
        settings | {"metric": metric, "threshold": threshold},
        functools.partial(adapted, name, threshold),
      )
      for threshold in tried
    ]
    labels = [f"{metric} {'>=' if higher else '<='} {threshold:g}" for threshold in tried]

    # Quality against the mean length.
    rows = [[f"{count} for all", count, None, *row["means"].values()] for count, row in zip(counts, plain)]
    rows += [
      [label, values["length"], float(arrays["within"].mean()), *values["means"].values()]
      for label, (values, arrays) in zip(labels, results)
    ]
    columns = ["tokens", "mean length", "within", *plain[0]["means"]]
    tables.append(Table(f"{name}: {plain[0]['num_images']} images", columns, rows))
    by_length = sorted((values for values, _ in results), key=lambda result: result["length"][0])
    for key in plain[0]["means"]:
      panel = panels.setdefault(metrics_lib.title(key), {})
      mean_lengths = [values["length"][0] for values in by_length]
      panel[name] = charts.Line(mean_lengths, [values["means"][key] for values in by_length], color=i)
      panel[f"{name}, same for all"] = charts.Line(counts, [row["means"][key] for row in plain], color=i, dashed=True)

    # Length against the number of objects.
    known = results[0][1]["num_objects"]
    if (known >= 0).any():
      grouped = [by_objects(known, arrays["lengths"]) for _, arrays in results]
      by_content[f"tokens of {name}"] = {
        label: charts.Line(list(rows), [mean for _, mean in rows.values()]) for label, rows in zip(labels, grouped)
      }
      correlations = [rank_correlation(known, arrays["lengths"])[0] for _, arrays in results]
      rows = [[count, scenes, *(rows[count][1] for rows in grouped)] for count, (scenes, _) in grouped[0].items()]
      rows.append(["rank correlation", len(known), *correlations])
      title = f"{name}: mean length by the number of objects"
      tables.append(Table(title, ["objects", "scenes", *labels], rows))
    pictures[name] = _draw_grid(labels, [arrays for _, arrays in results])
  return make_study_report(
    NAME,
    "Lengths chosen by quality",
    _ABOUT,
    tables,
    functools.partial(charts.curves, panels, "tokens, mean", counts, {"objects": by_content}),
    functools.partial(grids.below, pictures),
  )


def _draw_grid(labels: Sequence[str], columns: Sequence[Mapping[str, np.ndarray]]) -> Image.Image:
  """Draws a column of images per threshold, with their lengths in the corners."""
  original = columns[0]["original"]
  outside = {
    (row, 1 + j) for j, column in enumerate(columns) for row in range(len(original)) if not column["within"][row]
  }
  picture = grids.grid([original, *(column["restored"] for column in columns)], ["original", *labels], outside)
  draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
  for j, column in enumerate(columns):
    for row, length in enumerate(column["lengths"][: len(original)]):
      left, _, _, bottom = grids.cell_box(row, 1 + j, *original.shape[1:3])
      box = draw.textbbox((left + 4, bottom - 3), str(length), font, anchor="lb")
      draw.rectangle((left, box[1] - 3, box[2] + 4, bottom - 1), "white")
      draw.text((left + 4, bottom - 3), str(length), (32, 32, 32), font, anchor="lb")
  return picture
