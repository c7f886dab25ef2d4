"""Quality of reconstructions against the number of tokens, as a study."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flextok_jax.evals import figures, plots
from flextok_jax.evals.reconstruction import Report, curves_png
from flextok_jax.evals.report import Outcome, Parts, Table

ABOUT = (
  "Every image is encoded once and decoded from its first tokens, each time from the same noise. Drawn is the"
  " mean over images of what compares a reconstruction with its original; bars are its 95% interval."
)


def study(parts: Parts, run: Callable[[], Report], metrics: Sequence[str], settings: Mapping[str, Any]) -> Outcome:
  """Tells what an evaluation by these metrics finds.

  Args:
    run: of reconstruction.Reconstruction.
    settings: what decides the result.
  """

  def compute():
    report = run()
    examples = {
      f"{name}/{column}": images for name, columns in report.examples.items() for column, images in columns.items()
    }
    return report.scores, examples

  scores, examples = parts("tokens", settings, compute)
  tables, grids = [], {}
  for name, scored in scores["sets"].items():
    by_tokens = {k: {metric: row[metric] for metric in metrics} for k, row in scored["by_tokens"].items()}
    scored["by_tokens"], intervals = by_tokens, scored["intervals"]  # jax sorts names
    rows = [
      [int(k), *([value, *intervals[k].get(metric, ())] for metric, value in row.items())]
      for k, row in by_tokens.items()
    ]
    tables.append(Table(f"{name}: {scored['num_images']} images", ["tokens", *metrics], rows))
    columns = ["original", *by_tokens]
    labels = [plots.column_label(column, last=column == columns[-1]) for column in columns]
    grids[name] = plots.grid([examples[f"{name}/{column}"] for column in columns], labels)
  return Outcome(
    "Quality against the number of tokens", ABOUT, tables, curves_png(scores["sets"]), figures.below(grids)
  )
