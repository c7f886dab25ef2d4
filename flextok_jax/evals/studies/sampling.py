"""The study of samples: choices of the generator's tokens against settings of the tokenizer's decoder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
from typing import Any

import numpy as np

from flextok_jax.evals import charts, grids
from flextok_jax.evals.generation import LAYERS, NEED_IMAGES
from flextok_jax.evals.metrics import frechet, reference
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.metrics import samples as sample_metrics
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report, Table, make_study_report
from flextok_jax.evals.studies import variation
from flextok_jax.evals.studies.subject import Subject
from flextok_jax.inference.prompts import Condition
from flextok_jax.parallel import batching

# (images uint8 [n, h, w, 3], conditions [n]) -> scores by name.
Judge = Callable[[np.ndarray, Sequence[Condition]], dict[str, float]]

NAME = "sampling"
OWN = "own settings"
_ABOUT = (
  "Samples of the generator, with the same seeds in every cell. Each row changes one choice of tokens, each column one"
  " setting of the decoder; the first of each has the checkpoints' own settings. 'Between samples' is the mean over"
  " pairs of samples of the same condition: it measures how diverse they are, not how good."
)
_MOSAIC = 2  # images per side in a cell of the grid


def make_diversity(compare: Callable) -> Judge:
  """Makes a judge of how different samples of the same condition are; compare is that of metrics/image.py."""

  def judge(images, conditions):
    rows = [[i for i, other in enumerate(conditions) if other == each] for each in dict.fromkeys(conditions)]
    count = min(map(len, rows))
    if count < 2:
      raise ValueError(f"num_samples={count}: diversity needs at least two samples per condition")
    means = variation.pairwise(compare, images[np.array([row[:count] for row in rows])])
    return {f"{metrics_lib.title(k)} between samples": float(v.mean()) for k, v in means.items()}

  return judge


def make_comparison(
  compared: reference.Reference, extract: reference.Extract, names: Iterable[str], batch_size: int
) -> Judge:
  """Makes a judge of how samples differ from a reference set.

  Args:
    compared, extract: of evals/metrics/reference.py.
    names: of "gfid", "sfid", "precision" and "recall".
    batch_size: images per batch, at most that of extract.
  """

  def judge(images, conditions):
    seen = reference.from_features(extract(batching.slices(images, batch_size)))
    scores = {}
    for name in ("gfid", "sfid"):
      if name in names:
        scores[name] = frechet.frechet_distance(*seen.gaussians[LAYERS[name]], *compared.gaussians[LAYERS[name]])
    if set(NEED_IMAGES) & set(names):
      both = dict(zip(NEED_IMAGES, sample_metrics.precision_recall(compared.pools, seen.pools)))
      scores |= {name: both[name] for name in both if name in names}
    return scores

  return judge


def one_at_a_time(
  own: Mapping[str, Any], changes: Mapping[str, Iterable[Any]], prefix: str = ""
) -> dict[str, dict[str, Any]]:
  """Returns settings by label: `own`, and `own` with one other value of one of the changes each."""
  rows = {OWN: dict(own)}
  for name, values in changes.items():
    label = prefix + name.removeprefix("num_").replace("_", " ")
    rows |= {f"{label} {value:g}": {**own, name: value} for value in values if value != own[name]}
  return rows


def study(
  progress: Progress,
  subject: Subject,
  draw: Callable[[Mapping[str, Any]], tuple[np.ndarray, np.ndarray, np.ndarray]],
  judges: Sequence[Judge],
  conditions: Sequence[Condition],
  choices: Mapping[str, Mapping[str, Any]],
  samplers: Mapping[str, Mapping[str, Any]],
  settings: Mapping[str, Any],
) -> Report:
  """Judges samples for every choice of tokens and every setting of the decoder.

  Args:
    progress: keeps partial results.
    draw: choice -> (ids int [n, l], lengths int [n], log-probabilities [n]), one sample per condition.
    conditions: of the samples, equal ones next to each other.
    choices, samplers: by label, of one_at_a_time: arguments of draw, and settings of the decoder's sampler.
    settings: other settings that the results depend on: generator, conditions, metrics.
  """
  count = len(conditions)
  shown = np.unique(np.linspace(0, count - 1, _MOSAIC**2).astype(int))  # spread over the conditions

  def draw_tokens(choice):
    ids, lengths, log_probs = draw(choice)
    different = len({row[:length].tobytes() for row, length in zip(ids, lengths)})
    estimates = {
      "log-probability": sample_metrics.mean_with_interval(log_probs),
      "tokens": sample_metrics.mean_with_interval(lengths),
    }
    return estimates | {"different": different}, {"ids": ids, "lengths": lengths}

  def judge_samples(make_decode, drawn):
    images = make_decode()(drawn["ids"], drawn["lengths"], np.arange(count))
    scores = {}
    for judge in judges:
      scores |= judge(images, conditions)
    return scores, {"mosaic": _mosaic(images[shown])}

  drawn = {}
  for row, choice in choices.items():
    asked = {**settings, "choice": choice}
    drawn[row] = progress.compute(f"{NAME}_{_file(row)}", asked, functools.partial(draw_tokens, choice))
  cells = {}
  for column, sampler in samplers.items():
    make_decode = functools.cache(functools.partial(subject.make_decode, sampler))  # compiled once, and only if needed
    for row, (_, arrays) in drawn.items():
      part = f"{NAME}_{_file(row)}__{_file(column)}"
      asked = {**settings, "choice": choices[row], "decoder": sampler}
      cells[row, column] = progress.compute(part, asked, functools.partial(judge_samples, make_decode, arrays))

  own = {**choices[OWN], **{f"decoder {name}": value for name, value in samplers[OWN].items()}}
  rows = [[row, *values.values()] for row, (values, _) in drawn.items()]
  tables = [
    Table("Own settings", ["setting", "value"], list(own.items())),
    Table("Tokens drawn", ["choice", "log-probability", "tokens", f"different, of {count}"], rows),
  ]
  panels = {}
  for name in next(iter(cells.values()))[0]:
    values = [[cells[row, column][0][name] for column in samplers] for row in choices]
    tables.append(Table(name, ["choice", *samplers], [[row, *scores] for row, scores in zip(choices, values)]))
    panels[name] = np.array(values)
  columns = [np.stack([cells[row, column][1]["mosaic"] for row in choices]) for column in samplers]
  return make_study_report(
    NAME,
    "Choices of the generator against settings of the decoder",
    _ABOUT,
    tables,
    functools.partial(charts.heat_maps, panels, list(choices), list(samplers)),
    functools.partial(grids.grid, [list(choices), *columns], ["", *samplers]),
  )


def _mosaic(images: np.ndarray) -> np.ndarray:
  """Arranges up to 4 images [n, h, w, 3] as [2 h, 2 w, 3]; missing ones are white."""
  missing = ((0, _MOSAIC**2 - len(images)), (0, 0), (0, 0), (0, 0))
  four = np.pad(images, missing, constant_values=255)
  return np.concatenate([np.concatenate(list(four[i : i + _MOSAIC]), 1) for i in range(0, len(four), _MOSAIC)])


def _file(label: str) -> str:
  return label.replace(" ", "_")
