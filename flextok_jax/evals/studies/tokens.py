"""The study of reconstruction quality against the number of tokens."""

from collections.abc import Sequence
import functools
from typing import Any

from flextok_jax.evals import grids
from flextok_jax.evals.from_config import evaluate
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.reconstruction import draw_curves, draw_grid, fit_log_linear
from flextok_jax.evals.report import Report, Table, make_study_report
from flextok_jax.evals.studies.subject import Subject

NAME = "tokens"
_ABOUT = (
  "Every image is encoded once and decoded from its first tokens, each time from the same noise. Shown is the mean"
  " over images of metrics that compare a reconstruction with its original; bars are 95% intervals of the mean, and"
  " dashed lines are fits that are linear in the logarithm of the number of tokens."
)


def study(progress: Progress, subject: Subject, metrics: Sequence[str], weights: str | None) -> Report:
  """Evaluates reconstructions at every token count.

  Args:
    progress: keeps partial results.
    metrics: of images, and "rfid" (see from_config.evaluate).
    weights: folder with the weights of networks.
  """
  config = subject.config
  settings = subject.settings_of(config.eval.sources) | {"num_tokens": list(subject.counts)}

  def compute():
    partial = progress.nested(NAME, settings)
    report = evaluate(config, subject.params, metrics, weights, partial)
    partial.clear()
    return report.scores, {
      f"{name}/{column}": images for name, columns in report.examples.items() for column, images in columns.items()
    }

  scores, examples = progress.compute(NAME, settings, compute)
  tables = []
  pictures = {}
  for name, scored in scores["sets"].items():
    rows: list[list[Any]] = [
      [int(count), *([row[metric], *scored["intervals"][count].get(metric, ())] for metric in metrics)]
      for count, row in scored["by_tokens"].items()
    ]
    tables.append(Table(f"{name}: {scored['num_images']} images", ["tokens", *metrics], rows))
    if len(subject.counts) > 2:
      of = lambda metric, scored=scored: [row[metric] for row in scored["by_tokens"].values()]
      fits: list[list[Any]] = [[metric, *fit_log_linear(subject.counts, of(metric))[::2]] for metric in metrics]
      tables.append(Table(f"{name}: fits", ["metric", "per doubling of tokens", "share of variance"], fits))
    pictures[name] = draw_grid({column: examples[f"{name}/{column}"] for column in ("original", *scored["by_tokens"])})
  return make_study_report(
    NAME,
    "Quality against the number of tokens",
    _ABOUT,
    tables,
    functools.partial(draw_curves, scores["sets"]),
    functools.partial(grids.below, pictures),
  )
