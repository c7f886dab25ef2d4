"""The study of how much the tokens leave open: how different decodes of the same tokens from several noises are."""

from collections.abc import Callable
import functools
import itertools

import numpy as np

from flextok_jax.evals import charts, grids
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.metrics.samples import mean_with_interval
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report, Table, make_study_report
from flextok_jax.evals.studies.subject import Subject

NAME = "variation"
_ABOUT = (
  "Every image is decoded several times from the same tokens, each time from another noise. The fewer tokens, the more"
  " they leave open and the more the decodes differ. Shown is the mean over all pairs of decodes of an image, then over"
  " images; bars are 95% intervals of the mean."
)


def pairwise(compare: Callable, images: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the mean metrics over all pairs of images of the same group.

  Args:
    compare: of metrics/image.py:make_compare, with symmetric metrics.
    images: uint8 [n, m, h, w, 3], n groups of m >= 2 images.

  Returns:
    {name: float64 [n]}.
  """
  pairs = [compare(images[:, i], images[:, j]) for i, j in itertools.combinations(range(images.shape[1]), 2)]
  return {name: np.stack([pair[name] for pair in pairs]).mean(0, dtype=np.float64) for name in pairs[0]}


def study(progress: Progress, subject: Subject, num_decodes: int) -> Report:
  """Measures the variation at every token count.

  Args:
    progress: keeps partial results.
    num_decodes: decodes of the same tokens, at least 2; decode j of image i has noise i * num_decodes + j.
  """
  tables = []
  panels: dict[str, dict[str, charts.Line]] = {}
  pictures = {}
  counts, num_examples = subject.counts, subject.config.eval.grid_images

  def compute(name: str, count: int):
    images, ids = subject.encoded(name)
    noise = np.arange(len(ids) * num_decodes)
    repeated = np.repeat(ids[:, :count], num_decodes, 0)  # [n m, count]
    decodes = subject.decode(repeated, np.full(len(noise), count), noise)
    decodes = decodes.reshape(len(ids), num_decodes, *decodes.shape[1:])  # [n, m, h, w, 3]
    means = {metric: mean_with_interval(values) for metric, values in pairwise(subject.compare, decodes).items()}
    examples = {"original": images[:num_examples], "decodes": decodes[:num_examples]}
    return {"num_images": len(ids), "means": means}, examples

  for name in subject.config.eval.sources:
    settings = subject.settings_of([name]) | {"num_decodes": num_decodes}
    results = [
      progress.compute(f"{NAME}_{name}_{count}", settings, functools.partial(compute, name, count)) for count in counts
    ]
    means = [values["means"] for values, _ in results]
    rows = [[count, *row.values()] for count, row in zip(counts, means)]
    title = f"{name}: {results[0][0]['num_images']} images, {num_decodes} decodes of each"
    tables.append(Table(title, ["tokens", *means[0]], rows))
    for metric in means[0]:
      panel = panels.setdefault(f"{metrics_lib.title(metric)} between decodes", {})
      panel[name] = charts.Line(counts, [row[metric] for row in means])
    columns = [grids.grid([results[0][1]["original"]], ["original"], apart=False)]
    for count, (_, examples) in zip(counts, results):
      labels = [grids.column_label(str(count), last=count == counts[-1])] + [""] * (num_decodes - 1)
      columns.append(grids.grid(list(examples["decodes"].swapaxes(0, 1)), labels, apart=False))
    pictures[name] = grids.beside(columns)
  return make_study_report(
    NAME,
    "Variation against the number of tokens",
    _ABOUT,
    tables,
    functools.partial(charts.curves, panels, "tokens", counts),
    functools.partial(grids.below, pictures),
  )
