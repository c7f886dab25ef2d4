"""The study of why order matters: ordered tokens beside those of a 2D grid, whole and in part."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.evals import charts, grids
from flextok_jax.evals.metrics import frechet
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report, Table, make_study_report
from flextok_jax.evals.studies.subject import Subject
from flextok_jax.inference import adaptive, prompts
from flextok_jax.inference.generator import ARGenerator

NAME = "order"
_LOSS_ROWS = 8  # sequences whose logits exist at once
_ABOUT = (
  "The first tokens of every image, decoded: of ordered tokens they are a coarse picture, of a grid, read row by row,"
  " the top of one. The Fréchet distance to the originals is that of means and deviations of fixed filters. Of"
  " generators of both kinds of tokens: the cross-entropy of each position, given the tokens before it and the image's"
  " class or caption, and samples for the classes or captions of the images, decoded from their first tokens."
)


def study(
  progress: Progress,
  subjects: Mapping[str, Subject],
  generators: Mapping[str, ARGenerator],
  settings: Mapping[str, Any],
) -> Report:
  """Compares tokenizers at every token count, and generators of their tokens.

  Args:
    progress: keeps partial results.
    subjects: tokenizers by label, of images of one size; the first has the evaluation sets and the token counts.
    generators: by the label of their tokenizer; may be empty.
    settings: other settings that the results depend on.
  """
  first = next(iter(subjects.values()))
  counts, num_examples = first.counts, first.config.eval.grid_images

  def measure(label: str, name: str, count: int):
    subject, images = subjects[label], first.sets[name]["image"]
    ids = subject.encoded(name)[1][:, :count]
    decodes = subject.decode(ids, np.full(len(ids), ids.shape[1]), np.arange(len(ids)))
    values = {metric: float(found.mean()) for metric, found in first.compare(images, decodes).items()}
    values["Fréchet"] = frechet.frechet_distance(*first.gaussian_of_set(name), *first.gaussian(decodes))
    return values, {"decodes": decodes[:num_examples]}

  def measure_generator(label: str, name: str):
    gen, subject, found = generators[label], subjects[label], first.sets[name]
    conditions = _conditions(gen, found)
    losses = _losses(gen, subject.encoded(name)[1][:, : gen.num_tokens], conditions)
    sequences, _ = prompts.draw(gen, conditions, None, first.config.seed, first.config.eval.batch_size)
    ids, drawn = adaptive.pad_sequences(sequences, gen.num_tokens)
    quality, examples = {}, {}
    for count in counts:
      decodes = subject.decode(ids[:, :count], np.minimum(drawn, count), np.arange(len(ids)))
      quality[str(count)] = frechet.frechet_distance(*first.gaussian_of_set(name), *first.gaussian(decodes))
      examples[f"samples_{count}"] = decodes[:num_examples]
    return {"loss": losses.mean(0).tolist(), "quality": quality}, examples

  tables, pictures = [], {}
  panels: dict[str, dict[str, charts.Line]] = {}
  by_position: dict[str, dict[str, charts.Line]] = {}
  for name in first.config.eval.sources:
    asked = {**first.settings_of([name]), **settings}
    compute = lambda part, function, *args, asked=asked: progress.compute(
      f"{NAME}_{part}", asked, functools.partial(function, *args)
    )
    columns = [grids.grid([first.sets[name]["image"][:num_examples]], ["original"], apart=False)]
    for i, label in enumerate(subjects):
      results = [compute(f"{name}_{label}_{count}", measure, label, name, count) for count in counts]
      rows = [[count, *values.values()] for count, (values, _) in zip(counts, results)]
      title = f"{name}, {label}: {len(first.sets[name]['image'])} images"
      tables.append(Table(title, ["tokens", *map(metrics_lib.title, results[0][0])], rows))
      for metric in results[0][0]:
        panel = panels.setdefault(f"{metrics_lib.title(metric)}: {name}", {})
        panel[label] = charts.Line(counts, [values[metric] for values, _ in results], color=i)
      shown = [found["decodes"] for _, found in results]
      columns.append(grids.grid(shown, [f"{label} {counts[0]}", *map(str, counts[1:])], apart=False))
      if label in generators:
        values, examples = compute(f"{name}_{label}_generator", measure_generator, label, name)
        quality = [values["quality"][str(count)] for count in counts]
        panels.setdefault(f"Fréchet of samples: {name}", {})[label] = charts.Line(counts, quality, color=i)
        loss = values["loss"]
        by_position.setdefault(f"cross-entropy (nats): {name}", {})[label] = charts.Line(
          range(1, len(loss) + 1), loss, color=i
        )
        title = f"{name}, generator of {label} tokens: {np.mean(loss):.3f} nats per token"
        tables.append(Table(title, ["tokens", "Fréchet of samples"], [list(row) for row in zip(counts, quality)]))
        shown = [examples[f"samples_{count}"] for count in counts]
        pictures[f"{name}, samples of {label} tokens"] = grids.grid(shown, list(map(str, counts)), apart=False)
    pictures[name] = grids.beside(columns)
  return make_study_report(
    NAME,
    "Ordered tokens beside a grid",
    _ABOUT,
    tables,
    functools.partial(
      charts.curves, panels, "tokens", counts, {"position of the token": by_position} if by_position else None
    ),
    functools.partial(grids.below, pictures),
  )


def _conditions(gen: ARGenerator, found: Mapping[str, Any]) -> list[prompts.Condition]:
  """Returns the class or caption of each image of an evaluation set, as the generator takes them."""
  kind = gen.config.ar.condition
  if kind == "class":
    return found["label"].tolist()
  return list(found["caption"]) if kind == "text" else [None] * len(found["image"])


def _losses(gen: ARGenerator, ids: np.ndarray, conditions: Sequence[prompts.Condition]) -> np.ndarray:
  """Returns the cross-entropy [n, tokens] of ids [n, tokens]."""
  parts = []
  for start in range(0, len(ids), _LOSS_ROWS):
    rows = slice(start, start + _LOSS_ROWS)
    given: dict[str, Any] = {}
    if gen.config.ar.condition == "class":
      given = {"labels": conditions[rows]}
    elif gen.config.ar.condition == "text":
      features, lengths = gen.encode_text([str(text) for text in conditions[rows]])
      given = {"text_embeddings": features, "text_lengths": lengths}
    log_probs = jax.nn.log_softmax(gen.logits(ids[rows], **given))
    parts.append(-np.asarray(jnp.take_along_axis(log_probs, jnp.asarray(ids[rows])[..., None], -1)[..., 0]))
  return np.concatenate(parts)
