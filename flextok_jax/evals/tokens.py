"""Quality of reconstructions against the number of tokens, as a study."""

from collections.abc import Callable, Sequence

from flextok_jax.evals import figures, plots
from flextok_jax.evals.reconstruction import Report, curves_png
from flextok_jax.evals.report import Outcome, Parts, Table

ABOUT = ("Every image is encoded once and decoded from its first tokens, each time from the same noise. Drawn is the mean"
         " over images of what compares a reconstruction with its original.")


def study(parts: Parts, run: Callable[[], Report], sets: Sequence[str], num_images: int, grid_images: int) -> Outcome:
  """Tells what an evaluation of these sets found; run is that of reconstruction.Reconstruction."""

  def compute():
    report = run()
    examples = {f"{name}/{column}": images for name, columns in report.examples.items()
                for column, images in columns.items()}
    return report.scores, examples

  asked = {"sets": list(sets), "num_images": num_images, "grid_images": grid_images}
  scores, examples = parts("tokens", asked, compute)
  tables, grids = [], {}
  for name, scored in scores["sets"].items():
    by_tokens = scored["by_tokens"]
    counts, metrics = [int(count) for count in by_tokens], list(next(iter(by_tokens.values())))
    rows = [[count, *row.values()] for count, row in zip(counts, by_tokens.values())]
    tables.append(Table(f"{name}: {scored['num_images']} images", ["tokens", *metrics], rows))
    columns = ["original", *by_tokens]
    labels = [plots.column_label(column, last=column == columns[-1]) for column in columns]
    grids[name] = plots.grid([examples[f"{name}/{column}"] for column in columns], labels)
  return Outcome("Quality against the number of tokens", ABOUT, tables,
                 curves_png(scores["sets"]), figures.below(grids))
