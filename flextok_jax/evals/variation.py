"""How much the tokens leave open: decodes of the same tokens from several noises, and how far they lie apart."""

from collections.abc import Callable, Mapping, Sequence
import itertools

import numpy as np

from flextok_jax.evals import figures, measures, plots
from flextok_jax.evals.report import Outcome, Parts, Table

ABOUT = ("Every image is decoded several times from the same tokens, each time from another noise. Fewer tokens say less:"
         " the decodes then agree on what the tokens say and differ in all else. Drawn is the mean over all pairs of"
         " decodes of an image, then over images; bars are its standard error.")


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
    parts: Parts, decode: Callable, compare: Callable, sets: Mapping[str, tuple[np.ndarray, np.ndarray]],
    counts: Sequence[int], num_decodes: int, grid_images: int,
) -> Outcome:
  """Measures the variation at every token count.

  Args:
    decode, compare: of batches.make_decode and make_compare; decode j of image i has noise i * num_decodes + j.
    sets: {name: (images uint8 [n, h, w, 3], ids int [n, l])}.
  """
  tables, lines, grids = [], {}, {}
  for name, (images, ids) in sets.items():
    found = []
    for count in counts:
      def compute(count=count, images=images, ids=ids):
        noise = np.arange(len(ids) * num_decodes)
        decoded = decode(np.repeat(ids[:, :count], num_decodes, 0), np.full(len(noise), count), noise)
        decoded = decoded.reshape(len(ids), num_decodes, *decoded.shape[1:])
        means = {k: figures.mean_and_error(v) for k, v in pairwise(compare, decoded).items()}
        return means, {"decodes": decoded[:grid_images]}

      asked = {"set": name, "num_images": len(images), "num_decodes": num_decodes, "grid_images": grid_images}
      found.append(parts(f"variation_{name}_{count}", asked, compute))
    metrics = list(found[0][0])
    rows = [[count, *itertools.chain(*(means[metric] for metric in metrics))]
            for count, (means, _) in zip(counts, found)]
    columns = ["tokens", *itertools.chain(*((metric, f"{metric}, standard error") for metric in metrics))]
    tables.append(Table(f"{name}: {len(images)} images, {num_decodes} decodes of each", columns, rows))
    for metric in metrics:
      panel = lines.setdefault(f"{measures.UNITS.get(metric, metric)}, between decodes", {})
      panel[name] = figures.Line(counts, *zip(*(means[metric] for means, _ in found)))
    shown = images[:grid_images]
    columns = [plots.grid([shown], ["original"], apart=False)]
    for count, (_, pictures) in zip(counts, found):
      labels = [plots.column_label(str(count), last=count == counts[-1])] + [""] * (num_decodes - 1)
      columns.append(plots.grid(list(pictures["decodes"].swapaxes(0, 1)), labels, apart=False))
    grids[name] = figures.beside(columns)
  return Outcome("Variation against the number of tokens", ABOUT, tables,
                 figures.curves(lines, "tokens", ticks=counts), figures.below(grids))
