"""The study of what tokens tell about classes: linear probes of the encoder's features, by number of tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any

from flax.core import meta
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from ml_collections import FrozenConfigDict
import numpy as np
import scipy.linalg

from flextok_jax.core.progress import track, write
from flextok_jax.data import pipeline
from flextok_jax.evals import charts
from flextok_jax.evals.metrics.samples import mean_with_interval
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report, Table, make_study_report
from flextok_jax.evals.studies.subject import Subject
from flextok_jax.inference.tokenizer import FlexTok, encode_features
from flextok_jax.parallel import sharding
from flextok_jax.parallel.batching import batch_rows, map_batches, replicate
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.training import inputs

NAME = "probe"
PENALTIES = tuple(10.0**i for i in range(-5, 3))  # times the mean of the eigenvalues that are not zero
MAX_BYTES = 2**29  # of the features of all images; more registers than fit are left out
_CHOOSING = 5  # every 5th training image serves to choose the penalty
_RANDOM = ", random encoder"
_ABOUT = (
  "The class of an image by a linear probe: ridge regression of one-hot targets on standardised features, fitted to"
  " images of the training split, with the penalty that is best on a fifth of them. Shown is the accuracy on the"
  " validation split, with its 95% interval. Features are the first k registers after the last block of the encoder and"
  " the codes of the first k tokens, concatenated; the mean of the patches that the tokens depend on; the latents that"
  " the encoder gets, concatenated; and those of networks whose weights are given. The control is the same encoder with"
  " random weights."
)
Features = dict[str, np.ndarray]  # by name: [n, d], or of tokens [n, k, d]
Encoder = tuple[Callable, Any]  # (params, images uint8 [b, h, w, 3]) -> features, and params


def study(progress: Progress, subject: Subject, train_images: int, others: Mapping[str, Partial]) -> Report:
  """Fits probes to features of the encoder, at every token count, and of other networks.

  Args:
    progress: keeps partial results.
    subject: the tokenizer; of its evaluation sets, those without labels are left out.
    train_images: of each set, at most.
    others: networks by name, images float [b, h, w, 3] in [0, 1] -> [b, d].

  Raises:
    ValueError: no evaluation set has labels.
  """
  counts, names = subject.counts, subject.config.eval.sources
  tables: list[Table] = []
  panels: dict[str, dict[str, charts.Line]] = {}
  for name in names:
    sizes, found = _study_set(progress, subject, name, train_images, others)
    if not found:
      write(f"{name} has no classes with images in both splits: it is left out")
      continue
    title = "{train} images for training, {validation} for validation, {classes} classes".format(**sizes)
    tables += _tables(f"{name}: {title}", counts, found, sizes["chance"])
    panels[f"accuracy of classes: {name}"] = _lines(counts, found)
  if not tables:
    raise ValueError(
      f"no evaluation set of {', '.join(names)} has classes with images in both splits: name others in --sources"
    )
  return make_study_report(
    NAME, "Classes by linear probes", _ABOUT, tables, functools.partial(charts.curves, panels, "tokens", counts)
  )


def _study_set(
  progress: Progress, subject: Subject, name: str, train_images: int, others: Mapping[str, Partial]
) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
  """Returns sizes and accuracies of an evaluation set, as _measure does, of all encoders; {}: it has no classes."""
  c = subject.config
  images = {
    split: pipeline.EvalImages(inputs.image_data(c), name, image_size=c.image_size, num_images=size, split=split)
    for split, size in (("train", train_images), ("validation", c.eval.num_images))
  }
  settings = subject.settings_of([name]) | {"train_images": train_images, "num_tokens": list(subject.counts)}

  def compute(part: str, make_encoder: Callable[[], Encoder]) -> dict[str, Any]:
    part = f"{NAME}_{name}_{part}"
    return progress.compute(part, settings, lambda: (_measure(subject, images, *make_encoder()), {}))[0]

  count = sum(map(len, images.values()))
  own = compute("encoder", lambda: _encoder(subject, count))
  if not own["classes"]:
    return own, {}
  random = compute("random", lambda: _encoder(subject, count, random=True))
  found = own["accuracy"] | {f"{label}{_RANDOM}": rows for label, rows in random["accuracy"].items()}
  for other, network in others.items():
    found |= compute(other, functools.partial(_network, other, network))["accuracy"]
  return own, found


# Features.


def _encoder(subject: Subject, num_images: int, random: bool = False) -> Encoder:
  """Returns the encoder of a tokenizer, or the same one with random weights."""
  c, params = subject.config, subject.params
  if random:
    params = {**params, "encoder": replicate(_random_encoder(subject), subject.mesh)}
  is_grid, depth = c.tokens.layout == "grid", c.encoder.depth
  most = max((k for k in subject.counts if 4 * num_images * k * c.encoder.width <= MAX_BYTES), default=0)
  if most < max(subject.counts) and not is_grid:
    write(f"registers of more than {most} tokens are left out: {num_images} images with more do not fit in memory")

  def encode(model, images):
    features = functools.partial(encode_features, model, images)
    found = {"codes": features("codes", depth, max(subject.counts))}
    if most and not is_grid:
      found["registers"] = features("registers", depth, most)
    # Without a grid of tokens, nothing depends on the patches after the last block.
    found["patches"] = features("patches", depth if is_grid else max(depth - 1, 1), model.num_registers).mean(1)
    return found | ({} if random else {"latents": jnp.reshape(model.encode_latents(images), (len(images), -1))})

  return encode, FlexTok(params, FrozenConfigDict(c))


def _random_encoder(subject: Subject) -> Any:
  """Returns new parameters of the encoder; those of its head, which training begins at zero, are drawn as well."""
  key, head_key = jax.random.split(jax.random.key(subject.config.seed))
  model = make_model(subject.config)
  size = subject.config.image_size
  shape = model.latent_shape(size, size)
  params = meta.unbox(jax.jit(model.encoder.init)(key, [(jnp.zeros((1, *shape)), None)]))["params"]
  kernel = params["head"]["kernel"]
  drawn = jax.random.normal(head_key, kernel.shape, kernel.dtype) / kernel.shape[0] ** 0.5
  return {**params, "head": {**params["head"], "kernel": drawn}}


def _network(name: str, network: Partial) -> Encoder:
  return lambda network, images: {name: network(images.astype(jnp.float32) / 255)}, network


def _read(
  subject: Subject, images: pipeline.EvalImages, function: Callable, params: Any
) -> tuple[Features, np.ndarray]:
  """Returns the features and labels int [n] of all images with a label, which are read batch by batch."""
  count, mesh = len(images), subject.mesh
  labels: list[int] = []
  found: Features = {}
  size = batch_rows(subject.config.eval.batch_size, count, mesh)

  def batches() -> Iterator[np.ndarray]:
    for first in range(0, count, size):
      records = images.records(slice(first, first + size), with_captions=False)
      labels.extend(record["label"] for record in records)
      yield np.stack([record["image"] for record in records])

  compute = jax.jit(function, out_shardings=sharding.replicated(mesh))
  params, done = replicate(params, mesh), 0
  results = map_batches(functools.partial(compute, params), batches(), size, mesh)
  for batch in track(
    results, count, "images encoded", size=lambda batch: len(jax.tree.leaves(batch)[0]), transient=True
  ):
    for name, rows in batch.items():
      found.setdefault(name, np.empty((count, *rows.shape[1:]), np.float32))[done : done + len(rows)] = rows
    done += len(rows)
  known = np.array(labels) >= 0
  return {name: x if known.all() else x[known] for name, x in found.items()}, np.array(labels)[known]


# Probes.


def _measure(subject: Subject, images: Mapping[str, pipeline.EvalImages], function: Callable, params: Any) -> dict:
  """Fits probes to the features of an encoder.

  Returns:
    {"classes": number, 0 if the splits have none in common; "train", "validation": images; "chance": accuracy of the
    most frequent class; "accuracy": {features: {number of tokens, or "all": [accuracy, low, high]}}}.
  """
  train, labels = _read(subject, images["train"], function, params)
  validation, expected = _read(subject, images["validation"], function, params)
  classes, y = np.unique(labels, return_inverse=True)
  if len(classes) < 2 or not np.isin(expected, classes).any():
    return {"classes": 0}
  expected = np.array([{label: i for i, label in enumerate(classes)}.get(label, -1) for label in expected])
  accuracy: dict[str, dict[str, list[float]]] = {}
  for name in ("registers", "codes", *train):
    if name not in train or name in accuracy:
      continue
    x, new = train[name], validation[name]
    tokens = {"all": x.shape[1]} if x.ndim == 2 else {str(k): k for k in subject.counts if k <= x.shape[1]}
    accuracy[name] = {
      label: mean_with_interval(probe(_flat(x[:, :k]), y, _flat(new[:, :k])) == expected) for label, k in tokens.items()
    }
  chance = float((expected == np.bincount(y).argmax()).mean())
  sizes = {"classes": len(classes), "train": len(y), "validation": len(expected), "chance": chance}
  return sizes | {"accuracy": accuracy}


def probe(x: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
  """Returns the classes int [m] that a linear probe predicts.

  Closed-form ridge regression rather than logistic regression: it has no learning rate and no number of steps, which
  would suit some features better than others, and its result is deterministic.

  Args:
    x: features for training [n, d], in random order.
    labels: their classes, int [n], from 0.
    new: features to classify [m, d].
  """
  targets = np.eye(labels.max() + 1, dtype=np.float32)[labels]
  choosing = np.arange(len(x)) % _CHOOSING == 0
  scores = ridge(x[~choosing], targets[~choosing], x[choosing], PENALTIES)
  right = [(score.argmax(1) == labels[choosing]).mean() for score in scores]
  best = max(range(len(PENALTIES)), key=lambda i: (right[i], i))  # of equally good ones the largest
  return next(ridge(x, targets, new, PENALTIES[best : best + 1])).argmax(1)


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray, penalties: Sequence[float]) -> Iterator[np.ndarray]:
  """Yields the predictions [m, c] of ridge regression with an intercept, for each penalty.

  Features are standardised. The linear system has the smaller of the sizes n and d. Penalties are in units of
  max(n, d), the mean of the min(n, d) largest eigenvalues of the Gram matrix.

  Args:
    x: features [n, d].
    y: targets [n, c].
    new: features to predict for [m, d].
    penalties: above 0.
  """
  mean, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
  scale = np.where(scale > 1e-6, scale, 1)  # features that do not vary become 0
  # In float64: of correlated features, an eigenvalue may be n * d, and its error in float32 above the penalty.
  x, new = ((part - mean) / scale for part in (x, new))
  intercept = y.mean(0)
  dual = x.shape[1] > x.shape[0]
  gram, right = (x @ x.T, y - intercept) if dual else (x.T @ x, x.T @ (y - intercept))
  left = new @ x.T if dual else new
  for penalty in penalties:
    ridged = gram + penalty * max(x.shape) * np.eye(len(gram))
    yield left @ scipy.linalg.solve(ridged, right, overwrite_a=True, assume_a="pos") + intercept


def _flat(x: np.ndarray) -> np.ndarray:
  return x.reshape(len(x), -1)


# Report.


def _tables(title: str, counts: Sequence[int], found: Mapping[str, Mapping[str, list[float]]], chance: float):
  """Returns a table of the features of tokens, a row per count, and one of the others."""
  by_tokens = {name: rows for name, rows in found.items() if "all" not in rows}
  rows = [[count, *(rows.get(str(count)) for rows in by_tokens.values())] for count in counts]
  whole: list[list] = [[name, rows["all"]] for name, rows in found.items() if "all" in rows]
  return [
    Table(f"{title}: accuracy by number of tokens", ["tokens", *by_tokens], rows),
    Table(f"{title}: accuracy of other features", ["features", "accuracy"], [*whole, ["most frequent class", chance]]),
  ]


def _lines(counts: Sequence[int], found: Mapping[str, Mapping[str, list[float]]]) -> dict[str, charts.Line]:
  """Returns a line for the features of tokens, and level ones for the others, of which the control is left out."""
  lines = {}
  names = [name for name in found if not name.endswith(_RANDOM)]
  for name, rows in found.items():
    color, dashed = names.index(name.removesuffix(_RANDOM)), name.endswith(_RANDOM)
    if "all" not in rows:
      known = [count for count in counts if str(count) in rows]
      lines[name] = charts.Line(known, [rows[str(count)] for count in known], color, dashed)
    elif not dashed:
      lines[name] = charts.Line(counts, [rows["all"][0]] * len(counts), color)
  return lines
