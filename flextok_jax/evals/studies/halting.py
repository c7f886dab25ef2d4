"""Adaptive length, measured: quality against the lengths that thresholds choose, and lengths against the content."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import numpy as np
from PIL import ImageDraw, ImageFont
import scipy.stats

from flextok_jax.evals import batches, figures, plots
from flextok_jax.evals.metrics import measures
from flextok_jax.evals.report import Outcome, Parts, Table
from flextok_jax.inference import adaptive

ABOUT = (
  "Every image takes as few tokens as its reconstruction needs to come within a threshold. Drawn is the"
  " mean over images against their mean length (solid), beside as many tokens for all (dashed); bars are 95%"
  " intervals. One threshold for all makes images equally good, which need not be the best mean. Where the"
  " number of objects in a scene is known: the mean length by it. In the grid a picture carries its length,"
  " and a frame where even all tokens do not come within the threshold."
)


def make_lengths(config, params, name: str, measure: measures.Measure, seed: int, batch_size: int, mesh) -> Callable:
  """Makes the function that chooses lengths by adaptive.shortest_prefix, from one noise for all images.

  Args:
    params: of the tokenizer.
    name: of the measure; of those in measures.BETTER_HIGH a threshold is the least that will do.

  Returns:
    (images uint8 [n, h, w, 3], ids int [n, l], threshold) -> (lengths int32 [n], measures of the prefixes float32 [n]).
  """
  sign = -1 if name in measures.BETTER_HIGH else 1

  def choose(both, images, ids, threshold):
    params, measure = both
    distance = lambda a, b: sign * measure((a + 1) / 2, (b + 1) / 2)
    return adaptive.make_search(config, distance, seed)(params, threshold, images, ids)

  batched = batches.Batched(choose, (params, measure), batch_size, mesh)

  def lengths(images, ids, threshold: float):
    chosen, reached = batched(images, ids, np.full(len(ids), sign * threshold, np.float32))
    return chosen, sign * reached

  return lengths


def by_objects(num_objects: np.ndarray, lengths: np.ndarray) -> dict[int, tuple[int, list[float]]]:
  """Returns {number of objects: (scenes, mean length and the ends of its interval)}, without unknown numbers, -1."""
  counts = np.unique(num_objects[num_objects >= 0]).tolist()
  chosen = {count: lengths[num_objects == count] for count in counts}
  return {count: (len(x), figures.estimate(x)) for count, x in chosen.items()}


def rank_correlation(num_objects: np.ndarray, lengths: np.ndarray) -> tuple[float | None, float | None]:
  """Returns Spearman's rank correlation of lengths and known numbers of objects and its p, None where all are equal."""
  lengths, num_objects = lengths[num_objects >= 0], num_objects[num_objects >= 0]
  if not len(lengths) or not np.ptp(lengths) or not np.ptp(num_objects):
    return None, None
  rho, p = scipy.stats.spearmanr(num_objects, lengths)
  return float(rho), float(p)


def study(
  parts: Parts,
  decode: Callable,
  compare: Callable,
  lengths: Callable,
  encoded: Callable,
  num_objects: Callable,
  sets: Mapping[str, Mapping[str, Any]],
  counts: Sequence[int],
  metric: str,
  thresholds: Sequence[float],
) -> Outcome:
  """Compares adaptive lengths with fixed ones.

  Args:
    decode, compare: of batches.make_decode and make_compare; all images have noise 0, as lengths are chosen by it.
    lengths: of make_lengths.
    encoded: name of a set -> (images uint8 [n, h, w, 3], ids int [n, l]).
    num_objects: name of a set -> int [n], -1 where it is not known.
    sets: by name what decides their images, and "grid_images", of which pictures are shown.
    counts: the fixed lengths.
    metric: of the thresholds, among those of compare.
    thresholds: (): on each set what its images have on average at each fixed length.
  """

  def restored(name: str, chosen: np.ndarray):
    images, ids = encoded(name)
    decoded = decode(ids[:, : chosen.max()], chosen, np.zeros(len(ids)))
    means = {k: figures.estimate(v) for k, v in compare(images, decoded).items()}
    shown = slice(sets[name]["grid_images"])
    return {"num_images": len(ids), "means": means}, {"original": images[shown], "restored": decoded[shown]}

  def fixed(name: str, count: int):
    return restored(name, np.full(len(encoded(name)[1]), count))

  def adapted(name: str, threshold: float):
    chosen, reached = lengths(*encoded(name), threshold)
    numbers, pictures = restored(name, chosen)
    within = reached >= threshold if metric in measures.BETTER_HIGH else reached <= threshold
    arrays = {"lengths": chosen, "within": within, "num_objects": num_objects(name)}
    return numbers | {"length": figures.estimate(chosen)}, pictures | arrays

  tables, lines, grids, by_content = [], {}, {}, {}
  for i, (name, asked) in enumerate(sets.items()):
    plain = [parts(f"halting_{name}_fixed_{k}", asked, functools.partial(fixed, name, k))[0] for k in counts]
    tried = sorted(thresholds or {float(f"{row['means'][metric][0]:.4g}") for row in plain})
    found = []
    for threshold in tried:
      own = {**asked, "metric": metric, "threshold": threshold}
      found.append(parts(f"halting_{name}_{metric}_{threshold:g}", own, functools.partial(adapted, name, threshold)))
    sign = ">=" if metric in measures.BETTER_HIGH else "<="
    labels = [f"{metric} {sign} {q:g}" for q in tried]
    tables.append(
      Table(
        f"{name}: {plain[0]['num_images']} images",
        ["tokens", "mean length", "within", *plain[0]["means"]],
        [[f"{k} for all", k, None, *row["means"].values()] for k, row in zip(counts, plain)]
        + [
          [label, numbers["length"], float(arrays["within"].mean()), *numbers["means"].values()]
          for label, (numbers, arrays) in zip(labels, found)
        ],
      )
    )
    order = np.argsort([numbers["length"][0] for numbers, _ in found])
    for key in plain[0]["means"]:
      panel = lines.setdefault(measures.UNITS.get(key, key), {})
      chosen = [found[j][0] for j in order]
      panel[name] = figures.Line([x["length"][0] for x in chosen], [x["means"][key] for x in chosen], color=i)
      panel[f"{name}, same for all"] = figures.Line(counts, [x["means"][key] for x in plain], color=i, dashed=True)
    known = found[0][1]["num_objects"]
    if (known >= 0).any():
      grouped = [by_objects(known, arrays["lengths"]) for _, arrays in found]
      by_content[f"tokens of {name}"] = {
        label: figures.Line(list(rows), [mean for _, mean in rows.values()]) for label, rows in zip(labels, grouped)
      }
      correlations = [rank_correlation(known, arrays["lengths"])[0] for _, arrays in found]
      rows = [[count, scenes, *(rows[count][1] for rows in grouped)] for count, (scenes, _) in grouped[0].items()]
      tables.append(
        Table(
          f"{name}: mean length by the number of objects",
          ["objects", "scenes", *labels],
          [*rows, ["rank correlation", len(known), *correlations]],
        )
      )
    grids[name] = _grid(labels, [arrays for _, arrays in found])
  figure = figures.curves(lines, "tokens, mean", ticks=counts, others={"objects": by_content})
  return Outcome("Lengths chosen by quality", ABOUT, tables, figure, figures.below(grids))


def _grid(labels: Sequence[str], columns: Sequence[Mapping[str, np.ndarray]]):
  """Pictures of each threshold, with their lengths in the corner."""
  original = columns[0]["original"]
  outside = {
    (row, 1 + j) for j, column in enumerate(columns) for row in range(len(original)) if not column["within"][row]
  }
  picture = plots.grid([original, *(column["restored"] for column in columns)], ["original", *labels], outside)
  draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
  for j, column in enumerate(columns):
    for row, length in enumerate(column["lengths"][: len(original)]):
      left, _, _, bottom = plots.cell_box(row, 1 + j, *original.shape[1:3])
      box = draw.textbbox((left + 4, bottom - 3), str(length), font, anchor="lb")
      draw.rectangle((left, box[1] - 3, box[2] + 4, bottom - 1), "white")
      draw.text((left + 4, bottom - 3), str(length), (32, 32, 32), font, anchor="lb")
  return picture
