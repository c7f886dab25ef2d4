"""Evaluations as a config describes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import os
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from flextok_jax.config import flatten, get_config
from flextok_jax.core.files import printable
from flextok_jax.data import pipeline, transforms
from flextok_jax.data.shards import tokens
from flextok_jax.data.sources import registry
from flextok_jax.evals import published
from flextok_jax.evals.metrics import image as metrics_lib
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.reconstruction import RFID, Reconstruction, Settings
from flextok_jax.evals.report import Report
from flextok_jax.evals.scaling_factor import ScalingFactor
from flextok_jax.evals.token_loss import TokenLoss
from flextok_jax.inference.decoding import token_counts
from flextok_jax.parallel import batching, sharding
from flextok_jax.parallel.batching import replicate
from flextok_jax.stages import make_stage
from flextok_jax.training import checkpoint, inputs
from flextok_jax.weights.perception import networks

_MODEL_FIELDS = ("stage", "image_size", "vae", "encoder", "decoder", "tokens", "ar", "text")
_NO_EFFECT = (  # fields of the model that have no effect on evaluations
  "vae.sample_posterior",
  "tokens.nested_dropout",
  "tokens.null_prob",
  "tokens.quantization_dropout",
  "tokens.corruption",
  "ar.class_names",
  "ar.tokenizer",
  "ar.drop_condition",
  "ar.position_decay",
  *checkpoint.FREE_AR,
)


def make_evaluator(
  config: ConfigDict,
  stage: Any,
  mesh: Any,
  prepare: Callable[[dict], dict],
  metrics: Sequence[str] = (),
  weights: str | None = None,
  progress: Progress | None = None,
  lazy: bool = False,
  resize: str = "crop",
) -> Reconstruction | TokenLoss:
  """Returns the evaluation of config.eval; its run(params) returns a report.

  A tokenizer or VAE is evaluated on the validation splits of config.eval.sources, a generator on that of
  config.data.tokens.

  Args:
    stage: of the config (see flextok_jax/stages).
    prepare: of training/inputs.py, for stage "ar".
    metrics: from the NAMES of evals/metrics/image.py, and "rfid"; (): psnr, ssim, mae. Not for stage "ar".
    weights: folder with the weights of networks, see weights/perception/networks.py.
    progress: keeps partial results.
    lazy: whether images are read as they are needed, and not kept for another run.
    resize: of images, see transforms.to_size; other than "crop" needs `lazy`. Not for stage "ar".

  Raises:
    ValueError: a setting out of range, or nothing to evaluate on.
  """
  c = config.eval
  if config.stage == "ar":
    if resize != "crop":
      raise ValueError(f"resize={resize} has no meaning for a generator, whose data are tokens")
    if metrics:
      raise ValueError(f"metrics={','.join(metrics)} of a generator are of its samples: give a tokenizer as well")
    arrays = tokens.eval_arrays(*inputs.open_tokens(config, "validation"), c.num_images)
    return TokenLoss(
      stage.predict_fns["token_losses"], arrays, c.batch_size, mesh, prepare, None if progress else False
    )
  names = [name for name in metrics if name != RFID] if metrics else metrics_lib.METRICS
  per_image = metrics_lib.make_metrics(names, weights)
  features = networks.inception(weights, RFID) if RFID in metrics else None
  counts = () if config.stage == "vae" else token_counts(c.num_tokens, config.tokens.num_registers)
  data = inputs.image_data(config)
  sets: dict[str, Any] = {}
  if resize != "crop" and config.stage != "vae" and config.tokens.layout == "grid":
    raise ValueError(f"resize={resize} has no meaning for tokens on a grid, whose images have one size: use crop")
  multiple = stage.vae.downscale if config.stage == "vae" else stage.model.patch_multiple
  how: dict[str, Any] = dict(resize=resize, multiple=multiple)
  for name in c.sources:
    images = pipeline.EvalImages(data, name, image_size=config.image_size, num_images=c.num_images, **how)
    sets[name] = images.by_size() if resize != "crop" else images if lazy else images[:]
  settings = Settings(counts, c.batch_size, config.seed, c.grid_images)
  return Reconstruction(stage.predict_fns, sets, settings, mesh, per_image, features, progress)


def evaluate(
  config: ConfigDict,
  params: Any,
  metrics: Sequence[str] = (),
  weights: str | None = None,
  progress: Progress | None = None,
  resize: str = "crop",
) -> Report:
  """Evaluates params on all devices, as make_evaluator says; images are read as they are needed."""
  mesh, stage = sharding.make_mesh(), make_stage(config)
  prepare = inputs.make_prepare(config, mesh)
  evaluator = make_evaluator(config, stage, mesh, prepare, metrics, weights, progress, lazy=True, resize=resize)
  report = evaluator.run(replicate(params, mesh))
  return with_published(report, config) if resize == "crop" else report  # published ones are of crops


def with_published(report: Report, config: ConfigDict) -> Report:
  """Returns a report of reconstructions with the published ones, for each set of ImageNet's validation at 256 px."""
  if config.image_size != published.IMAGE_SIZE or config.stage == "ar":
    return report
  sets = [name for name in config.eval.sources if published.is_imagenet_validation(config.data.sources[name])]
  tables = [published.table(name, report.scores["sets"][name]["by_tokens"]) for name in sets]
  return dataclasses.replace(report, tables=[*report.tables, *filter(None, tables)])


def reference_images(
  config: ConfigDict | None, image_size: int | None, num_images: int, batch_size: int
) -> Callable[[str], Iterator[np.ndarray]]:
  """Returns a function from the name of a data source of the config, or of a folder, to batches of its images.

  Args:
    config: its data; None if only folders are read.
    image_size: of the images, in pixels; None if neither is read.
    num_images: images at most.
  """

  def open_images(name: str) -> Iterator[np.ndarray]:
    is_source = name in registry.SOURCES
    if is_source and config is None:
      raise ValueError(f"reference={name} is a data source: give a config that describes it (or ./{name}, a folder)")
    if not is_source and not os.path.isdir(name):
      sources = ", ".join(registry.SOURCES)
      raise ValueError(f"reference={printable(name)[:200]} is no folder, no .npz file and no data source ({sources})")
    if image_size is None:
      raise ValueError("image_size is missing: the size in pixels of the pictures of the reference")
    if not is_source:
      share = (config or get_config()).data.max_unreadable
      return transforms.folder_batches(name, image_size, num_images, batch_size, share)
    images = pipeline.EvalImages(inputs.image_data(config), name, image_size=image_size, num_images=num_images)
    return batching.slices(images, batch_size)

  return open_images


def make_measure(config: ConfigDict, stage: Any, mesh: Any, evaluator: Any) -> Callable[[Any], dict[str, float]]:
  """Returns a function of parameters that measures the fields that the config leaves open: {dotted field: value}.

  It measures vae.scaling_factor, on the images of the evaluator (a Reconstruction), for stage "vae" with a scaling
  factor of 0; otherwise it returns {}.
  """
  if config.stage != "vae" or config.vae.scaling_factor:
    return lambda params: {}
  measure = ScalingFactor(stage.predict_fns["moments"], evaluator.images, config.eval.batch_size, mesh)
  return lambda params: {"vae.scaling_factor": measure(params)}


def with_model(given: ConfigDict, trained: ConfigDict, check: bool = True) -> ConfigDict:
  """Returns the config `given` with the fields of the model of the config `trained`.

  Args:
    check: whether to refuse configs of different models (see check_same_model).
  """
  if check:
    check_same_model(given, trained)
  config = given.copy_and_resolve_references()
  with config.unlocked():
    for name in _MODEL_FIELDS:
      config[name] = trained[name]
  return config


def check_same_model(given: Mapping[str, Any], trained: Mapping[str, Any]):
  """Raises ValueError if two configs describe different models."""
  given, trained = flatten(given), flatten(trained)
  if not given.get("vae.scaling_factor"):  # measured: see config/defaults.py
    given.pop("vae.scaling_factor", None)
  for name in sorted(given.keys() & trained.keys()):
    if name.split(".")[0] in _MODEL_FIELDS and name not in _NO_EFFECT and given[name] != trained[name]:
      raise ValueError(
        f"the given config has {name} = {given[name]!r}, but the checkpoint was trained with"
        f" {trained[name]!r}: give the config of that run, or none"
      )
