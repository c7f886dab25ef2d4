"""Samples of a generator by how tokens are chosen, against how the decoder makes pictures of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
from typing import Any

import numpy as np

from flextok_jax.evals import figures, plots
from flextok_jax.evals.generation import NEED_IMAGES
from flextok_jax.evals.metrics import frechet as statistics
from flextok_jax.evals.metrics import measures, reference
from flextok_jax.evals.metrics import samples as sample_metrics
from flextok_jax.evals.report import Outcome, Parts, Table
from flextok_jax.evals.studies import variation

# (pictures uint8 [n, h, w, 3], conditions [n]) -> numbers by name.
Judge = Callable[[np.ndarray, Sequence[int | str | None]], dict[str, float]]

ABOUT = (
  "Samples of the generator, of the same seeds in every cell. Rows change one choice of tokens at a time,"
  " columns one setting of the decoder; the first of each has the checkpoints' own. 'Between samples' is the"
  " mean over pairs of samples of the same condition: how diverse they are, not how good."
)
_MOSAIC = 2  # pictures a side in a cell of the grid


def diversity(compare: Callable) -> Judge:
  """Makes the judge of how far samples of the same condition lie apart; compare is that of batches.make_compare."""

  def judge(pictures, conditions):
    rows = [[i for i, other in enumerate(conditions) if other == each] for each in dict.fromkeys(conditions)]
    count = min(map(len, rows))
    if count < 2:
      raise ValueError("diversity needs two samples of a condition at least: raise --num_samples")
    means = variation.pairwise(compare, pictures[np.array([row[:count] for row in rows])])
    return {f"{measures.UNITS.get(k, k)} between samples": float(v.mean()) for k, v in means.items()}

  return judge


def against(compared: reference.Reference, look: Callable, names: Iterable[str], batch_size: int) -> Judge:
  """Makes the judge by what a reference set is.

  Args:
    compared, look: of evals/metrics/reference.py; look takes up to batch_size images.
    names: of "gfid", "sfid", "precision" and "recall".
  """

  def judge(pictures, conditions):
    parts = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
    seen, found = reference.look_at(parts, look), {}
    for name, layer in (("gfid", "pool"), ("sfid", "spatial")):
      if name in names:
        found[name] = statistics.frechet_distance(*seen.gaussians[layer], *compared.gaussians[layer])
    if set(NEED_IMAGES) & set(names):
      both = dict(zip(("precision", "recall"), sample_metrics.precision_recall(compared.pools, seen.pools)))
      found |= {name: both[name] for name in both if name in names}
    return found

  return judge


def one_at_a_time(
  own: Mapping[str, Any], changes: Mapping[str, Iterable[Any]], prefix: str = ""
) -> dict[str, dict[str, Any]]:
  """Returns settings by label: `own` as they are, then with each other value of each change in place of its own."""
  rows = {"own settings": dict(own)}
  for name, values in changes.items():
    label = prefix + name.removeprefix("num_").replace("_", " ")
    rows |= {f"{label} {value:g}": {**own, name: value} for value in values if value != own[name]}
  return rows


def study(
  parts: Parts,
  draw: Callable,
  decoder: Callable,
  judges: Sequence[Judge],
  conditions: Sequence[int | str | None],
  choices: Mapping[str, Mapping],
  decoders: Mapping[str, Mapping],
  settings: Mapping[str, Any],
) -> Outcome:
  """Judges samples by every choice and every setting of the decoder.

  Args:
    draw: what a choice holds -> (ids int [n, l], lengths int [n], log-probabilities [n]) of a sample a condition.
    decoder: what a setting of the decoder holds -> function of batches.make_decode.
    conditions: of the samples, those of the same condition together.
    choices, decoders: by label, of one_at_a_time.
    settings: what decides the results else: generator, conditions, metrics.
  """
  count = len(conditions)
  shown = np.unique(np.linspace(0, count - 1, _MOSAIC**2).astype(int))  # of as many conditions as there are

  def sequences(choice):
    ids, lengths, log_probs = draw(choice)
    numbers = {"log-probability": figures.estimate(log_probs), "tokens": figures.estimate(lengths)}
    return numbers | {"different": len({row[:n].tobytes() for row, n in zip(ids, lengths)})}, {
      "ids": ids,
      "lengths": lengths,
    }

  def point(decode, drawn):
    pictures = decode()(drawn["ids"], drawn["lengths"], np.arange(count))
    numbers = {}
    for judge in judges:
      numbers |= judge(pictures, conditions)
    return numbers, {"mosaic": _mosaic(pictures[shown])}

  drawn = {}
  for label, choice in choices.items():
    asked = {**settings, "choice": choice}
    drawn[label] = parts(f"sampling_{_file(label)}", asked, functools.partial(sequences, choice))
  cells = {}
  for column, sampler in decoders.items():
    decode = functools.cache(functools.partial(decoder, sampler))  # made, and compiled, once if at all
    for row, (_, arrays) in drawn.items():
      asked = {**settings, "choice": choices[row], "decoder": sampler}
      cells[row, column] = parts(
        f"sampling_{_file(row)}__{_file(column)}", asked, functools.partial(point, decode, arrays)
      )
  names = list(next(iter(cells.values()))[0])
  own = {**choices["own settings"], **{f"decoder {k}": v for k, v in decoders["own settings"].items()}}
  tables = [
    Table("Own settings", ["setting", "value"], list(own.items())),
    Table(
      "Tokens drawn",
      ["choice", "log-probability", "tokens", f"different, of {count}"],
      [[label, *numbers.values()] for label, (numbers, _) in drawn.items()],
    ),
  ]
  panels = {}
  for name in names:
    rows = [[cells[row, column][0][name] for column in decoders] for row in choices]
    tables.append(Table(name, ["choice", *decoders], [[label, *row] for label, row in zip(choices, rows)]))
    panels[name] = np.array(rows)
  columns = [np.stack([cells[row, column][1]["mosaic"] for row in choices]) for column in decoders]
  return Outcome(
    "Choices of the generator against settings of the decoder",
    ABOUT,
    tables,
    figures.heat_maps(panels, list(choices), list(decoders)),
    plots.grid([list(choices), *columns], ["", *decoders]),
  )


def _mosaic(pictures: np.ndarray) -> np.ndarray:
  """[n, h, w, 3] -> [2 h, 2 w, 3], white where there are fewer than 4."""
  missing = ((0, _MOSAIC**2 - len(pictures)), (0, 0), (0, 0), (0, 0))
  four = np.pad(pictures, missing, constant_values=255)
  return np.concatenate([np.concatenate(list(four[i : i + _MOSAIC]), 1) for i in range(0, len(four), _MOSAIC)])


def _file(label: str) -> str:
  return label.replace(" ", "_")
