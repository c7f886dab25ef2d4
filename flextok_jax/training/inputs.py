"""Training inputs of every stage: images or latents, features of REPA's teacher, tokens and texts."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
import contextlib
import math
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.config import TOKENIZER_STAGES, float_dtype, get_config, read_config, with_fields
from flextok_jax.core.errors import quote, warn_once
from flextok_jax.data import pipeline, shapes
from flextok_jax.data.shapes import Bucket
from flextok_jax.data.shards import features, latents, tokens, trajectories
from flextok_jax.data.sources import registry
from flextok_jax.inference.text_encoder import load_t5_encoder
from flextok_jax.ops.repa import scaled_grid
from flextok_jax.parallel import processes, sharding
from flextok_jax.stages import repa
from flextok_jax.stages.distill import DistillStage
from flextok_jax.stages.stage import Stage
from flextok_jax.stages.tokenizer import TokenizerStage, bucket_rows
from flextok_jax.training import teacher as teacher_lib
from flextok_jax.weights import fingerprints, loading
from flextok_jax.weights.perception import networks

_PLACES = ("path", "val_path", "name")  # settings of sources that say where their images are


def image_data(config: ConfigDict) -> pipeline.ImageData:
  """Returns the image options of config.data; ValueError if a value is out of range."""
  data = config.data
  return pipeline.ImageData(
    sources=data.sources.to_dict(),
    crop=data.crop,
    crop_min_area=data.crop_min_area,
    flip=data.flip,
    reduce_jpeg=data.reduce_jpeg,
    loading=pipeline.Loading(data.num_threads, data.num_workers, data.prefetch),
    max_unreadable=data.max_unreadable,
    shapes=data.shapes,
    shape_weights=data.shape_weights,
  )


def check_new(config: ConfigDict):
  """Checks a new run for settings that cannot be meant; a resumed run has those that it began with.

  Raises:
    ValueError: see check_sources; ar.num_classes is above the number of ar.class_names, and no weights
      (config.init_from) need it; or data.shapes is given where batches have one shape.
  """
  ar, names = config.ar, config.ar.class_names
  for what, one_shape in (("stage 'ar'", config.stage == "ar"), ("data.trajectories", config.data.trajectories)):
    if config.data.shapes and one_shape:
      raise ValueError(f"data.shapes has no effect with {what}: set data.shapes=()")
  if config.stage == "ar":
    if ar.condition == "class" and names and ar.num_classes > len(names) and not config.init_from:
      raise ValueError(
        f"the token shards have {len(names)} classes, but ar.num_classes is {ar.num_classes}: set "
        f"ar.num_classes={len(names)}"
      )
  elif not config.data.latents and not config.data.trajectories:
    check_sources(config)


def check_sources(config: ConfigDict):
  """Raises ValueError if config.data names images of a source that is not read: of weight 0, not in eval.sources."""
  defaults = get_config().data.sources
  for kind, settings in config.data.sources.items():
    if settings.weight or kind in config.eval.sources:
      continue
    for name in _PLACES:
      if settings.get(name) != defaults[kind].get(name):
        alone = ", or give --data=DIR to use this folder alone" if kind == "folder" else ""
        raise ValueError(
          f"data.sources.{kind}.{name}={quote(settings[name])} is not read, because the weight of source {kind!r} is "
          f"0: set data.sources.{kind}.weight=1{alone}"
        )


def with_present_sources(config: ConfigDict, workdir: str = "") -> ConfigDict:
  """Returns the config with weight 0 for the optional sources (emoji, photos) that are missing on this machine.

  A warning names each of them. If nothing else would be left, all stay, and opening them is an error. So a run's
  config.json, its weights and the plan of shards say what was read, and with another choice they are not continued. All
  processes call it; what one of them lacks is left out in all.

  Args:
    config: of training or shards.
    workdir: of the run; "": of shards.

  Raises:
    ValueError: a source is missing with which the run in the workdir was trained.
  """
  if config.stage == "ar" or config.data.latents or config.data.trajectories:
    return config
  weights = {kind: settings.weight for kind, settings in config.data.sources.items() if settings.weight}
  lacking = _missing(weights, config)
  if lacking and workdir and (epath.Path(workdir) / "config.json").exists():
    trained = read_config(workdir).data.sources
    for kind, reason in lacking.items():
      if trained[kind].weight:
        raise ValueError(f"the run in {workdir} is trained on source {kind!r}, which is missing here: {reason}")
  if len(lacking) == len(weights):
    return config
  _warn_left_out(lacking)
  return with_fields(config, {f"data.sources.{kind}.weight": 0.0 for kind in lacking})


def with_present_sets(config: ConfigDict) -> ConfigDict:
  """Returns the config without the evaluation sets that are missing on this machine, as with_present_sources."""
  lacking = {} if config.stage == "ar" else _missing(config.eval.sources, config)
  present = tuple(kind for kind in config.eval.sources if kind not in lacking)
  if not lacking or not present:
    return config
  _warn_left_out(lacking)
  return with_fields(config, {"eval.sources": present})


def _missing(kinds: Iterable[str], config: ConfigDict) -> dict[str, str]:
  """Returns {kind of source: reason} of those that are missing on the machine of any process."""
  reasons = {}
  for kind in sorted(registry.OPTIONAL.keys() & set(kinds)):
    reason = registry.missing(kind, config.data.sources[kind].get("path", ""))
    reasons[kind] = processes.first_message(reason)
  return {kind: reason for kind, reason in reasons.items() if reason}


def _warn_left_out(lacking: Mapping[str, str]):
  for kind, reason in lacking.items() if processes.is_process_0() else ():
    warn_once(f"source {kind!r} is left out: {reason}")


def open_tokens(config: ConfigDict, split: str) -> tuple[tokens.TokenShards, tokens.TokenFormat]:
  """Returns the shards in config.data.tokens and the format in which stage "ar" reads them.

  Raises:
    FileNotFoundError, ValueError: the shards are missing, damaged or of another format.
  """
  ar, text = config.ar, config.text
  token_format = tokens.TokenFormat(
    num_ids=ar.num_ids,
    num_tokens=ar.num_tokens,
    stop=ar.stop,
    num_classes=ar.num_classes if ar.condition == "class" else None,
    tokenizer=ar.tokenizer,
    captions=(text.encoder, text.max_length, text.path) if ar.condition == "text" else None,
  )
  return tokens.open_tokens(config.data.tokens, split, token_format), token_format


def with_tokenizer(config: ConfigDict) -> ConfigDict:
  """Returns the config of stage "ar" with its token shards' class names and the fingerprint of their tokenizer.

  With it a run and its weights belong to one tokenizer. Configs of other stages are returned unchanged.

  Raises:
    FileNotFoundError, ValueError: the shards are missing or do not fit the config.
  """
  if config.stage != "ar":
    return config
  config = config.copy_and_resolve_references()
  meta = open_tokens(config, "train")[0].meta
  config.ar.tokenizer = meta["fingerprint"]
  if config.ar.condition == "class":
    config.ar.class_names = tuple(meta["class_names"] or ())
  return config


def with_weights(config: ConfigDict, workdir: str) -> ConfigDict:
  """Returns the config with what a run takes from the weights that it starts from.

  Stage "tokenizer": the scaling factor of its VAE, if it is 0 in the config. Stage "distill": that, and sampler and
  fingerprint of its teacher. They are those of a run in the workdir if there is one, else of the weights at
  config.init_from. Other configs are returned unchanged. All processes call it.

  Raises:
    FileNotFoundError, ValueError: there are no weights, or they lack these or are of another model.
  """
  if config.stage not in TOKENIZER_STAGES or (config.stage == "tokenizer" and config.vae.scaling_factor):
    return config
  resumed = read_config(workdir) if (epath.Path(workdir) / "config.json").exists() else None
  if resumed is None and not config.init_from:
    raise ValueError(
      "stage 'distill' needs a teacher: set init_from to the weights of a tokenizer"
      if config.stage == "distill"
      else "vae.scaling_factor=0 takes the factor of the weights to start from: set init_from to their path"
    )
  if config.stage == "tokenizer":
    factor = (resumed or loading.load_config(config.init_from)).vae.scaling_factor
    if not factor:
      raise ValueError(
        f"init_from={config.init_from} has no scaling factor of its latents: set vae.scaling_factor to 1 / their "
        "standard deviation"
      )
    return with_fields(config, {"vae.scaling_factor": factor})
  if resumed is not None:
    sampler, fingerprint, factor = resumed.distill.sampler, resumed.distill.teacher, resumed.vae.scaling_factor
  else:
    teacher, params = loading.load(config.init_from)
    if teacher.stage != "tokenizer":
      raise ValueError(f"init_from={config.init_from} is of stage {teacher.stage!r}: the teacher must be a tokenizer")
    sampler, fingerprint, factor = (
      teacher.sampler,
      fingerprints.tokenizer(teacher, params, decoder=True),
      teacher.vae.scaling_factor,
    )
  fields = {f"distill.sampler.{name}": value for name, value in sampler.items()}
  config = with_fields(config, fields | {"distill.teacher": fingerprint, "vae.scaling_factor": factor})
  if resumed is None and fingerprints.tokenizer(config, params, decoder=True) != fingerprint:
    raise ValueError(
      f"init_from={config.init_from} is another model than that of this config: encoder, decoder, tokens.levels and "
      "image_size must be those of the teacher"
    )
  return config


def check_latents(config: ConfigDict, frozen: dict):
  """Checks that the latent shards of a tokenizer, if any, are of its frozen VAE; all processes call it.

  Raises:
    FileNotFoundError, ValueError: the shards are missing, do not fit the config or are of another VAE.
  """
  if config.stage in TOKENIZER_STAGES and config.data.latents:
    _open_latents(config, fingerprints.vae(config, frozen))


def _open_latents(config: ConfigDict, fingerprint: str | None = None) -> latents.LatentShards:
  if config.vae.kind == "pixels":
    raise ValueError("vae.kind 'pixels' needs no latent shards, as its latents are the images: set data.latents=''")
  sizes = dict(image_size=config.image_size, latent_channels=config.vae.latent_channels, shapes=config.data.shapes)
  return latents.open_latents(config.data.latents, **sizes, fingerprint=fingerprint)


def read_networks(names: Mapping[str, str], folder: str) -> dict[str, dict]:
  """Returns {part: parameters} of the pretrained networks that a loss needs.

  Args:
    names: {part: name of its network}, stage.pretrained_networks.
    folder: of LPIPS's files, config.vae_loss.lpips.

  Raises:
    FileNotFoundError, ValueError: a network is missing or damaged; the message says what to put where.
  """
  params = {}
  for part, name in names.items():
    path = networks.path_in(folder, name) if folder else None
    if path is None:
      what = f"vae_loss.lpips={folder!r} must be a folder with {name}, which vae_loss.lpips_weight above 0 needs"
      raise ValueError(f"{what}: put there {networks.SOURCES[name]}")
    params[part] = networks.read_lpips(path, name.removeprefix("lpips_"))
  return params


def open_buckets(config: ConfigDict) -> list[Bucket]:
  """Returns the training images, or their latents, by their shapes; [] if there are none. All processes call it.

  With several shapes process 0 prints a table of them.

  Raises:
    FileNotFoundError, ValueError: see ImageData.buckets; or the processes see different pictures.
  """
  if config.stage == "ar" or config.data.trajectories or (config.data.latents and not config.data.shapes):
    return []
  if config.data.latents:
    groups = _open_latents(config).by_shape()
    total = sum(map(len, groups.values()))
    buckets = [Bucket(shape, len(rows) / total, {}, len(rows)) for shape, rows in groups.items()]
  else:
    buckets = image_data(config).buckets(config.image_size)
  if config.data.shapes:
    pictures = [(bucket.shape, bucket.pictures) for bucket in buckets]
    if not processes.same_on_all_processes(repr(pictures)):
      raise ValueError(f"the processes see different pictures; of this one: {pictures}")
    processes.log_on_process_0(shapes.table(buckets))
  return buckets


def train_batches(
  config: ConfigDict, start_step: int, mesh: jax.sharding.Mesh, buckets: Sequence[Bucket] | None = None
) -> Generator[dict]:
  """Returns an endless iterator, to be closed, over the batches of steps start_step, start_step + 1, ...

  Each batch has the rows that the devices of this process need, in their order.

  Args:
    config: of the run.
    start_step: first step.
    mesh: of its devices.
    buckets: open_buckets(config), if they are known already.
  """
  blocks, count = sharding.process_blocks(mesh)

  def block(index: int) -> Any:
    data = image_data(config)
    records: Any
    batches = dict(
      global_batch=config.data.global_batch,
      seed=config.seed,
      start_step=start_step,
      process_index=index,
      process_count=count,
    )
    if config.stage == "ar":
      drop_condition = config.ar.drop_condition
      return tokens.train_batches(*open_tokens(config, "train"), data.loading, drop_condition=drop_condition, **batches)
    if config.stage == "distill" and config.data.trajectories:
      rows = bucket_rows(config.data.global_batch, config.tokens.bucket_rows)
      records = trajectories.open_trajectories(
        config.data.trajectories,
        fingerprint=config.distill.teacher,
        intervals=math.lcm(*config.distill.steps),
        global_batch=config.data.global_batch,
        rows=rows,
      )
      return trajectories.train_batches(records, data.loading, rows=rows, **batches)
    if config.stage in TOKENIZER_STAGES and config.data.latents:
      records = _open_latents(config)
      if repa.section(config) is not None:
        teacher = features.FeatureShards(config.data.teacher)
        size = dict(grid=repa.teacher_grid(config), width=config.repa.features)
        records = features.LatentsWithFeatures(records, teacher, **size)
      return latents.train_batches(records, data.loading, **batches)
    return pipeline.train_batches(data, image_size=config.image_size, buckets=buckets, **batches)

  parts = [block(index) for index in blocks]
  if len(parts) == 1:
    return parts[0]
  return _side_by_side(parts)


def _side_by_side(parts: Sequence[Generator[dict]]) -> Generator[dict]:
  """Yields the batches of several iterators as one, and closes them when it is closed."""
  with contextlib.ExitStack() as stack:
    for part in parts:
      stack.enter_context(contextlib.closing(part))
    for rows in zip(*parts):
      yield {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def abstract_batch(
  config: ConfigDict, stage: Stage, image_shape: tuple[int, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of a global batch as the update receives it: that of train_batches after make_prepare.

  Args:
    config: of the run.
    stage: make_stage(config).
    image_shape: height and width of the images; default: image_size.
  """
  size, image_shape = config.data.global_batch, image_shape or (config.image_size, config.image_size)
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((size, *dims), jnp.dtype(dtype))
  batch = {"label": shape("int32"), "unreadable": shape("int32")}
  if config.stage == "ar":
    batch |= {"token_ids": shape("int32", config.ar.num_tokens), "length": shape("int32")}
    return batch | (abstract_text(size, config.dtype, **config.text) if config.ar.condition == "text" else {})
  if isinstance(stage, DistillStage) and config.data.trajectories:
    batch |= {"token_ids": shape("int32", config.tokens.num_registers), "keep_k": shape("int32")}
    batch["path"] = shape("float16", stage.intervals + 1, *stage.model.latent_shape(*image_shape))
  elif isinstance(stage, TokenizerStage) and config.data.latents:  # moments of the VAE, in float16 or bfloat16
    *sides, channels = stage.model.latent_shape(*image_shape)
    batch["latents"] = shape("bfloat16", *sides, 2 * channels)
  else:
    batch["image"] = shape("uint8", *image_shape, 3)
  if repa.section(config) is not None:  # computed by the teacher, or read from shards
    teacher_lib.check_source(config.data.latents, config.data.teacher)
    dtype = "float16" if config.data.teacher else config.repa.dtype
    rows, columns = scaled_grid(repa.teacher_grid(config), config.image_size, image_shape)
    batch["teacher"] = shape(dtype, rows * columns, config.repa.features)
  return batch


def abstract_text(
  rows: int, dtype: jnp.dtype | str, *, encoder: str, max_length: int, features: int, **_: Any
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of the texts of a batch: ids of bytes, or features of a frozen encoder.

  Args:
    rows: of the batch.
    dtype: of the features.
    encoder: "bytes" or "t5"; this and the rest are fields of config.text.
    max_length: tokens per text.
    features: per token.
  """
  lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
  if encoder == "bytes":
    return {"text_ids": jax.ShapeDtypeStruct((rows, max_length), jnp.int32), "text_lengths": lengths}
  return {
    "text_features": jax.ShapeDtypeStruct((rows, max_length, features), jnp.dtype(dtype)),
    "text_lengths": lengths,
  }


def make_prepare(config: ConfigDict, mesh: jax.sharding.Mesh, train: bool = False) -> Callable[[dict], dict]:
  """Returns a function of a batch on the devices that adds what frozen networks compute outside of the update.

  Text ids are replaced by the features of a T5, computed in config.dtype; with REPA and `train`, the features of its
  teacher are added as "teacher" [b, n, d], unless they are read from shards. Neither the state nor checkpoints hold
  these networks. Other batches are returned unchanged.

  Args:
    config: of the run.
    mesh: of its devices.
    train: whether batches are trained on.

  Raises:
    FileNotFoundError, ValueError: a network is missing or has another width than config.text.features or
      config.repa.features; or the teacher's features have no source.
  """
  if train and repa.section(config) is not None:
    path, width, shards = config.repa.teacher, config.repa.features, config.data.teacher
    teacher_lib.check_source(config.data.latents, shards)
    if shards:
      teacher_lib.check_shards(shards, path, width)
      return lambda batch: batch
    options = dict(
      grid=repa.teacher_grid(config),
      dtype=float_dtype("repa.dtype", config.repa.dtype),
      image_size=config.image_size,
      attention=config.attention,
    )
    features_fn = teacher_lib.make_features_fn(*teacher_lib.read_teacher(path, width), mesh, **options)
    return lambda batch: batch | {"teacher": features_fn(batch["image"])}
  if config.stage != "ar" or config.ar.condition != "text" or config.text.encoder != "t5":
    return lambda batch: batch
  encode = load_t5_encoder(config.text.path, config.dtype, config.text.features, mesh)

  def prepare(batch: dict) -> dict:
    batch = dict(batch)
    return batch | {"text_features": encode(batch.pop("text_ids"), batch["text_lengths"])}

  return prepare
