"""How much the tokens leave open: decodes of the same tokens from several noises, and how far they lie apart."""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
from typing import Any

import numpy as np

from flextok_jax.evals import figures, plots
from flextok_jax.evals.metrics import measures
from flextok_jax.evals.report import Outcome, Parts, Table

ABOUT = (
  "Every image is decoded several times from the same tokens, each time from another noise. Few tokens leave"
  " much open, in which the decodes differ. Drawn is the mean over all pairs of decodes of an image, then over"
  " images; bars are its 95% interval."
)


def pairwise(compare: Callable, pictures: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the mean measures over all pairs of pictures of the same thing.

  Args:
    compare: of batches.make_compare, of measures that are the same in both orders.
    pictures: uint8 [n, m, h, w, 3], m of 2 at least.

  Returns:
    {name: float64 [n]}.
  """
  pairs = [compare(pictures[:, i], pictures[:, j]) for i, j in itertools.combinations(range(pictures.shape[1]), 2)]
  return {name: np.mean([pair[name] for pair in pairs], axis=0, dtype=np.float64) for name in pairs[0]}


def study(
  parts: Parts,
  decode: Callable,
  compare: Callable,
  encoded: Callable[[str], tuple[np.ndarray, np.ndarray]],
  sets: Mapping[str, Mapping[str, Any]],
  counts: Sequence[int],
  num_decodes: int,
) -> Outcome:
  """Measures the variation at every token count.

  Args:
    decode, compare: of batches.make_decode and make_compare; decode j of image i has noise i * num_decodes + j.
    encoded: name of a set -> (images uint8 [n, h, w, 3], ids int [n, l]).
    sets: by name what decides their images, and "grid_images", of which pictures are shown.
  """
  tables, lines, grids = [], {}, {}

  def compute(name: str, count: int):
    images, ids = encoded(name)
    noise = np.arange(len(ids) * num_decodes)
    decoded = decode(np.repeat(ids[:, :count], num_decodes, 0), np.full(len(noise), count), noise)
    decoded = decoded.reshape(len(ids), num_decodes, *decoded.shape[1:])
    means = {metric: figures.estimate(values) for metric, values in pairwise(compare, decoded).items()}
    shown = slice(sets[name]["grid_images"])
    return {"num_images": len(ids), "means": means}, {"original": images[shown], "decodes": decoded[shown]}

  for name, settings in sets.items():
    asked = {**settings, "num_decodes": num_decodes}
    found = [parts(f"variation_{name}_{k}", asked, functools.partial(compute, name, k)) for k in counts]
    means = [numbers["means"] for numbers, _ in found]
    rows = [[count, *row.values()] for count, row in zip(counts, means)]
    title = f"{name}: {found[0][0]['num_images']} images, {num_decodes} decodes of each"
    tables.append(Table(title, ["tokens", *means[0]], rows))
    for metric in means[0]:
      panel = lines.setdefault(f"{measures.UNITS.get(metric, metric)} between decodes", {})
      panel[name] = figures.Line(counts, [row[metric] for row in means])
    columns = [plots.grid([found[0][1]["original"]], ["original"], apart=False)]
    for count, (_, pictures) in zip(counts, found):
      labels = [plots.column_label(str(count), last=count == counts[-1])] + [""] * (num_decodes - 1)
      columns.append(plots.grid(list(pictures["decodes"].swapaxes(0, 1)), labels, apart=False))
    grids[name] = figures.beside(columns)
  return Outcome(
    "Variation against the number of tokens",
    ABOUT,
    tables,
    figures.curves(lines, "tokens", ticks=counts),
    figures.below(grids),
  )
