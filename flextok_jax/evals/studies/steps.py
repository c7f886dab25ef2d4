"""The study of few-step decoding: what a decoder with fewer evaluations loses, held against its teacher."""

from collections.abc import Mapping, Sequence
import functools
import itertools
import time
from typing import Any, NamedTuple

import numpy as np

from flextok_jax.evals import charts, grids
from flextok_jax.evals.metrics import frechet
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report, Table, make_study_report
from flextok_jax.evals.studies.subject import Subject
from flextok_jax.models.tokenizer.flextok import Sampler

NAME = "steps"
_SHOWN = 2  # decodes of an image in the picture
_ABOUT = (
  "Every image is decoded several times from the same tokens and noises by every decoder. Distances to the original"
  " fall when steps are saved, because a decode becomes the mean of what is possible, so decoders are compared with"
  " the reference, the teacher at its own number of steps. Fidelity is the mean squared error to the reference's"
  " decode from the same noise, relative to that between two decodes of the reference: 0 is the same picture."
  " Variation is the mean squared error between decodes from two noises, relative to the same: 1 is as varied. Detail"
  " is the mean absolute difference of neighbouring pixels, relative to the originals. The Fréchet distance to the"
  " originals is that of means and deviations of fixed filters. Evaluations are those of the network per image,"
  " guidance included."
)


class Decoder(NamedTuple):
  """A decoder to compare.

  Attributes:
    subject: the tokenizer, a teacher or a student.
    num_steps: of its sampler.
  """

  subject: Subject
  num_steps: int

  @property
  def evaluations(self) -> int:
    """Evaluations of the network per image."""
    sampler = Sampler(**{**self.subject.config.sampler, "num_steps": self.num_steps})
    return sum((end - first) * (1 + guided) for first, end, guided in sampler.chunks(self.num_steps))


def mse(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the mean squared error of images uint8, as of images in [-1, 1]."""
  return float(np.mean(np.square((a.astype(np.float32) - b) / 127.5), dtype=np.float64))


def between_decodes(decodes: np.ndarray) -> float:
  """Returns the mean squared error over all pairs of decodes uint8 [n, m, h, w, 3] of the same image."""
  pairs = itertools.combinations(range(decodes.shape[1]), 2)
  return float(np.mean([mse(decodes[:, i], decodes[:, j]) for i, j in pairs]))


def detail(images: np.ndarray) -> float:
  """Returns the mean absolute difference of neighbouring pixels of images uint8 [..., h, w, 3], in levels."""
  images = images.astype(np.int16)
  return float(np.mean([np.abs(np.diff(images, axis=axis)).mean() for axis in (-3, -2)]))


def study(
  progress: Progress,
  subject: Subject,
  reference: str,
  decoders: Mapping[str, Decoder],
  num_decodes: int,
  settings: Mapping[str, Any],
) -> Report:
  """Compares decoders of the same tokens at every token count.

  Args:
    progress: keeps partial results.
    subject: the tokenizer whose tokens and evaluation sets are decoded.
    reference: label of the decoder that the others are compared with.
    decoders: by label.
    num_decodes: decodes of the same tokens, at least 2; decode j of image i has noise i * num_decodes + j.
    settings: other settings that the results depend on.
  """
  counts, num_examples = subject.counts, subject.config.eval.grid_images
  gaussian = lambda images: subject.gaussian(images.reshape(-1, *images.shape[-3:]))
  make = functools.cache(lambda label: decoders[label].subject.make_decode({"num_steps": decoders[label].num_steps}))

  def decode(label: str, name: str, count: int) -> tuple[np.ndarray, float]:
    """Returns decodes uint8 [n, m, h, w, 3] and seconds per decode."""
    ids, run = subject.encoded(name)[1], make(label)
    noise = np.arange(len(ids) * num_decodes)
    repeated = np.repeat(ids[:, :count], num_decodes, 0)  # [n m, count]
    lengths = np.full(len(noise), count)
    run(*(x[: subject.config.eval.batch_size] for x in (repeated, lengths, noise)))  # compiles
    start = time.monotonic()
    decodes = run(repeated, lengths, noise)
    seconds = (time.monotonic() - start) / len(noise)
    return decodes.reshape(len(ids), num_decodes, *decodes.shape[1:]), seconds

  def measure(label: str, name: str, count: int, compared: np.ndarray | None):
    images = subject.encoded(name)[0]
    decodes, seconds = decode(label, name, count)
    compared = decodes if compared is None else compared
    spread = max(between_decodes(compared), 1e-12)
    values = {
      "num_images": len(images),
      "evaluations": decoders[label].evaluations,
      "ms per image": 1000 * seconds,
      "fidelity": mse(decodes, compared) / spread,
      "variation": between_decodes(decodes) / spread,
      "detail": detail(decodes) / max(detail(images), 1e-12),
      "Fréchet": frechet.frechet_distance(*subject.gaussian_of_set(name), *gaussian(decodes)),
    }
    distances_to = [subject.compare(images, decodes[:, j]) for j in range(num_decodes)]
    for metric in subject.metrics:
      values[metrics_lib.title(metric)] = float(np.mean([found[metric] for found in distances_to]))
    return values, {"decodes": decodes}

  tables, pictures = [], {}
  panels: dict[str, dict[str, charts.Line]] = {}
  for name in subject.config.eval.sources:
    asked = {**subject.settings_of([name]), **settings, "num_decodes": num_decodes}
    for i, count in enumerate(counts):
      part = lambda label, name=name, count=count: f"{NAME}_{name}_{count}_{label.replace(' ', '_')}"
      compute = lambda label, compared, name=name, count=count, part=part, asked=asked: progress.compute(
        part(label), asked, functools.partial(measure, label, name, count, compared)
      )
      results = {reference: compute(reference, None)}
      compared = results[reference][1]["decodes"]
      for label in decoders:
        if label != reference:
          results[label] = compute(label, compared)

      values = {label: dict(found) for label, (found, _) in results.items()}
      num_images = [found.pop("num_images") for found in values.values()][0]
      title = f"{name}: {count} token{'s' * (count != 1)}, {num_images} images, {num_decodes} decodes of each"
      tables.append(
        Table(title, ["decoder", *values[reference]], [[label, *row.values()] for label, row in values.items()])
      )
      for metric in ("fidelity", "variation", "Fréchet", *map(metrics_lib.title, subject.metrics)):
        panel = panels.setdefault(f"{metric}: {name}", {})
        for role in dict.fromkeys(label.split()[0] for label in values):
          rows = sorted((row["evaluations"], row[metric]) for label, row in values.items() if label.split()[0] == role)
          x, y = zip(*rows)
          panel[f"{role}, {count}"] = charts.Line(x, y, color=i, dashed=role == reference.split()[0])
      pictures[f"{name}, {count} token{'s' * (count != 1)}"] = _picture(
        subject.encoded(name)[0][:num_examples], {label: found["decodes"] for label, (_, found) in results.items()}
      )
  ticks = sorted({decoder.evaluations for decoder in decoders.values()})
  return make_study_report(
    NAME,
    "Decoders with fewer evaluations",
    _ABOUT,
    tables,
    functools.partial(charts.curves, panels, "evaluations per image", ticks),
    functools.partial(grids.below, pictures),
  )


def _picture(images: np.ndarray, decodes: Mapping[str, np.ndarray]) -> Any:
  """Draws original images beside the first decodes of each decoder."""
  columns = [grids.grid([images], ["original"], apart=False)]
  for label, found in decodes.items():
    shown: Sequence[np.ndarray] = list(found[: len(images), :_SHOWN].swapaxes(0, 1))
    columns.append(grids.grid(shown, [label] + [""] * (len(shown) - 1), apart=False))
  return grids.beside(columns)
