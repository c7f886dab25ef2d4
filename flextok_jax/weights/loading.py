"""Loading weights: our files and workdirs, official FlexTok checkpoints, and diffusers' autoencoders.

Files are not trusted: nothing that a file names is imported or called, configurations are checked against a whitelist
(official/modules.py), and every tensor must have the name and shape of a parameter. Arrays are read one by one,
straight to their type and device.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import functools
import os
from pathlib import Path
import tempfile

from etils import epath
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from ml_collections import ConfigDict, FrozenConfigDict

from flextok_jax import stages
from flextok_jax.config import derive, parse_config, read_config, with_fields
from flextok_jax.core import accelerators, assets, hub, literals, workdirs
from flextok_jax.core.tensor_file import TensorFile, Tensors, named
from flextok_jax.stages import lora
from flextok_jax.stages.tokenizer import grid_tokens, make_model
from flextok_jax.weights import layout, orbax, reading
from flextok_jax.weights.folder import Folder, describe_others, has_weights
from flextok_jax.weights.official import diffusers, tokenizer_names
from flextok_jax.weights.official.tokenizer import from_official

CONFIG_KEY = "flextok_jax.config"  # metadata entry of our weights files
WEIGHTS = "weights.safetensors"  # in our folders
_LATENT_SIDE = 32  # side that the authors' code decodes by default, in latent pixels
_KIND = ("checkpoint", "EPFL-VILAB/flextok_d18_d28_dfn")  # of a Folder
_VAE = "vae"  # folder of the VAE in a pipeline of diffusers


def load(
  source: str | os.PathLike,
  *,
  param_dtype: str | None = "float32",
  dtype: str | None = None,
  vae_norm_num_groups: int = 32,
  mup_base_width: int | None = None,
  image_size: int | None = None,
  posemb_scaling: str | None = None,
  vae_tile: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  revision: str | None = None,
  subfolder: str = "",
) -> tuple[ConfigDict, dict]:
  """Loads a model.

  Args:
    source: the name of a model that ships, such as "glyphs"; a weights file, a run's workdir, a checkpoint of it
      (WORKDIR/checkpoints/STEP) or a folder of ours; an official .safetensors file, or folder of config.json and
      model.safetensors; a folder of diffusers' AutoencoderKL; or a repository of the Hugging Face hub with one of these
      folders.
    param_dtype: type of all arrays; None: each part has its compute type.
    dtype: compute type that replaces the checkpoint's (official checkpoints: float32). The VAE keeps its own.
    vae_norm_num_groups: groups of the VAE's GroupNorms, which official files do not store.
    mup_base_width: base width of official models trained with a muP readout, which their files do not store.
    posemb_scaling: of encoder and decoder, in place of the checkpoint's.
    vae_tile: config.vae.tile, in place of the checkpoint's.
    image_size: side in pixels that replaces the checkpoint's. Official files do not store it: the default is that of
      the authors' code, 32 latent pixels (256 px), or less if a position table is smaller.
    mesh: devices to place the arrays on by their logical axes; None: the default device.
    revision: branch, tag or commit of a repository; None: the main branch.
    subfolder: of the folder or repository.

  Returns:
    (config, params). From a folder with orbax checkpoints, params are the newest average.

  Raises:
    FileNotFoundError: the source does not exist.
    OSError: JAX's devices cannot start.
    ValueError: a damaged, foreign or unsupported file; the line names what is wrong.
  """
  source = os.fspath(source)
  if source.endswith(".json") and os.path.isfile(source):  # an index or a config.json stands for its folder
    source = os.path.dirname(source) or "."
  accelerators.start()
  options = reading.Options(
    *(param_dtype, dtype, vae_norm_num_groups, mup_base_width, image_size, mesh, revision, subfolder),
    *(posemb_scaling, vae_tile),
  )
  with _local(source, revision, subfolder) as source:
    return _load(source, options)


def _load(source: str, options: reading.Options) -> tuple[ConfigDict, dict]:
  if orbax.split(source)[1] is not None or workdirs.is_remote(source):
    return _load_workdir(source, options)
  if os.path.isdir(source):
    return _load_folder(source, options)
  if os.path.isfile(source):
    return _load_file(source, options)
  if hub.is_repository(source):
    return _load_pair(_on_hub(source, options), options)
  raise FileNotFoundError(
    f"no such checkpoint: {source}; give a file, a folder, a repository on Hugging Face, or the name of a model that "
    f"ships: {', '.join(assets.names())}"
  )


def load_config(source: str | os.PathLike) -> ConfigDict:
  """Returns the config of a model, without reading the arrays of our own formats. Arguments and errors are load's."""
  with _local(os.fspath(source)) as source:
    if is_run(source):
      config = read_config(orbax.split(source)[0])
      return with_fields(config, orbax.restore_average(source, {}, {}, _has_measured(config.stage, config.vae))[1])
    path = os.path.join(source, WEIGHTS) if os.path.isdir(source) else source
    if is_ours(path):
      return parse_config(TensorFile(path).metadata[CONFIG_KEY], path)
    return load(source)[0]


def is_run(source: str) -> bool:
  """Whether a source is a workdir with checkpoints, or one checkpoint of it."""
  return orbax.split(source)[1] is not None or orbax.directory(source).is_dir()


@contextlib.contextmanager
def _local(source: str, revision: str | None = None, subfolder: str = "") -> Iterator[str]:
  """Yields a source, with its subfolder, as a path of this machine if it is one of ours.

  Of a repository of the hub with a model of ours it is the weights file in the cache, of a file or a folder of weights
  in a bucket a temporary copy. Other repositories are yielded as they are.
  """
  source = assets.resolve(source)
  source = str(workdirs.resolve(source, "source")) if source.startswith(("gs:", "~")) else source
  if hub.is_repository(source) and not os.path.lexists(source):
    yield _own_weights(source, revision, subfolder) or source
    return
  if revision is not None:
    raise ValueError(f"revision={revision!r:.80} is of a repository of the Hugging Face hub, and {source} is none")
  source = os.path.join(source, subfolder) if subfolder else source
  if not workdirs.is_remote(source) or is_run(source):
    yield source
    return
  path = epath.Path(source)
  with tempfile.TemporaryDirectory(prefix="flextok_jax.") as folder:
    with workdirs.named(source, "source"):
      workdirs.download(path, Path(folder) / path.name)
    if not os.listdir(folder):
      raise FileNotFoundError(f"no such checkpoint: {source}")
    yield os.path.join(folder, path.name)


def _own_weights(repository: str, revision: str | None, subfolder: str) -> str | None:
  """Returns the path of the weights, in the cache, of a repository with a model of ours; None if it has none."""
  folder = Folder(repository, *_KIND, inside=subfolder, revision=revision)
  try:
    path = folder.find(hub.CONFIG)
  except FileNotFoundError:  # raised again where other formats are looked for
    return None
  return folder.find(WEIGHTS) if "stage" in folder.read_json(path) else None


def is_ours(source: str | os.PathLike, revision: str | None = None, subfolder: str = "") -> bool:
  """Whether a source exists and is a workdir, a folder, a checkpoint or a weights file in our own format."""
  with _local(os.fspath(source), revision, subfolder) as source:
    if os.path.isdir(source) and os.path.exists(os.path.join(source, WEIGHTS)):
      return True
    return is_run(source) or (os.path.isfile(source) and CONFIG_KEY in TensorFile(source).metadata)


def abstract_params(config: ConfigDict) -> dict:
  """Returns the shapes and types of a model's parameters."""
  trained, frozen = reading.init_shapes(FrozenConfigDict(config))
  return unbox({**trained, **frozen})


# Formats.


def _load_folder(folder: str, options: reading.Options) -> tuple[ConfigDict, dict]:
  inside = functools.partial(os.path.join, folder)
  config_path = inside(hub.CONFIG)
  if os.path.isfile(inside(WEIGHTS)) and not os.path.isdir(inside("checkpoints")):
    return _load_file(inside(WEIGHTS), options)
  if has_weights(folder):
    official = Folder(folder, *_KIND)
    if os.path.isfile(config_path):
      return _load_pair(official, options)
    return _load_tensors(official.tensors(), options)
  others = describe_others(folder)
  if os.path.isfile(config_path) and (os.path.isdir(inside("checkpoints")) or not others):
    return _load_workdir(folder, options)
  if os.path.isfile(inside(_VAE, hub.CONFIG)):  # of a pipeline of diffusers
    return _load_folder(inside(_VAE), options)
  raise FileNotFoundError(
    f"folder {folder} holds no checkpoint: neither {WEIGHTS}, {', '.join(hub.WEIGHTS)} nor a run's config.json{others}"
  )


def _on_hub(repository: str, options: reading.Options) -> Folder:
  """Returns a repository, or the VAE in it if it is a pipeline of diffusers."""
  if options.subfolder:
    return Folder(repository, *_KIND, inside=options.subfolder, revision=options.revision)
  config = Folder(repository, *_KIND, revision=options.revision).find(hub.CONFIG, f"{_VAE}/{hub.CONFIG}")
  inside = _VAE if os.path.basename(os.path.dirname(config)) == _VAE else ""
  return Folder(repository, *_KIND, inside=inside, revision=options.revision)


def _load_workdir(folder: str, options: reading.Options) -> tuple[ConfigDict, dict]:
  config = options.apply(read_config(orbax.split(folder)[0]))
  with reading.named_config_errors(folder):
    trained, frozen = reading.init_shapes(FrozenConfigDict(config))
    stage = stages.make_stage(config)
    if stage.lora:
      trained = trained | {lora.PART: jax.eval_shape(stage.lora.init, jax.random.key(0), frozen)}
  where = layout.placements({**trained, **frozen}, options.mesh)
  dtype_of = options.dtype_of(config.dtype, config.vae.dtype)
  typed = lambda boxed: unflatten_dict(
    {
      path: jax.ShapeDtypeStruct(x.shape, dtype_of(path), sharding=where[path])
      for path, x in flatten_dict(unbox(boxed), sep="/").items()
    },
    sep="/",
  )
  measured = _has_measured(config.stage, config.vae)
  params, fields = orbax.restore_average(folder, typed(trained), typed(frozen), measured)
  return with_fields(config, fields), stage.merged(params)


def _has_measured(stage: str, vae: Mapping) -> bool:
  """Whether a run's checkpoints hold config fields that it measured: a VAE's scaling factor that is not given."""
  return stage == "vae" and not vae["scaling_factor"]


def _load_file(path: str, options: reading.Options) -> tuple[ConfigDict, dict]:
  return _load_tensors(TensorFile(path), options)


def _load_tensors(file: Tensors, options: reading.Options) -> tuple[ConfigDict, dict]:
  """Loads a model whose configuration is in the metadata of its weights file."""
  path = file.path
  if CONFIG_KEY in file.metadata:
    config = options.apply(parse_config(file.metadata[CONFIG_KEY], path))
    own = lambda shapes: (layout.identity_entry(path, shape) for path, shape in shapes.items())
    return config, reading.read_params(file, config, options, own)
  if any(name.startswith("models.ar_image_model.") for name in file.shapes):
    raise ValueError(f"{path} holds a generator: load it by flextok_jax.load_ar, convert it with --generator")
  if "encoder" not in file.metadata:
    raise ValueError(
      f"{path} is no FlexTok checkpoint: its metadata has neither {CONFIG_KEY!r} nor an official configuration; "
      "if the weights came with a config.json, give the folder of both"
    )
  with named(path):
    official = literals.parse_literals(file.metadata)
  return _load_official(file, official, options)


def _load_pair(folder: Folder, options: reading.Options) -> tuple[ConfigDict, dict]:
  """Loads a tokenizer or diffusers' autoencoder from a config.json and weights, as on the hub."""
  config_path = folder.find(hub.CONFIG)
  fields = folder.read_json(config_path)
  file = folder.tensors()
  if "_class_name" in fields or "block_out_channels" in fields:
    with named(config_path):
      vae = diffusers.from_diffusers(fields)
    return _load_diffusers(file, vae, options)
  return _load_official(file, fields, options)


def _load_official(file: Tensors, official: Mapping, options: reading.Options) -> tuple[ConfigDict, dict]:
  """Loads a tokenizer, and its VAE from the hub if the file does not have it."""
  with named(file.path):
    settings, roles = from_official(official, mup_base_width=options.mup_base_width)
  vae, hub_id = settings["vae"], settings["vae"].pop("hub_id")
  has_vae = any(name.startswith(tokenizer_names.VAE_PREFIX) for name in file.shapes)
  loaded: dict = {}
  sizes: dict = {}
  if hub_id and not (has_vae and vae["scaling_factor"] is not None):
    if not hub.is_repository(hub_id):
      raise ValueError(f"{file.path}: vae.hf_hub_path {hub_id!r:.80} is no repository of the Hugging Face hub")
    own = dataclasses.replace(
      options, param_dtype=options.param_dtype or vae["dtype"], image_size=None, revision=None, subfolder=""
    )
    vae_config, loaded = _load_pair(_on_hub(hub_id, own), own)
    if vae_config.stage != "vae":
      raise ValueError(f"{file.path}: vae.hf_hub_path {hub_id} is no autoencoder")
    vae["scaling_factor"] = vae["scaling_factor"] or vae_config.vae.scaling_factor
    names = ("latent_channels", "block_out_channels", "layers_per_block", "norm_groups")
    sizes = {name: vae_config.vae[name] for name in names}
  if vae["scaling_factor"] is None:
    raise ValueError(f"{file.path}: vae.scaling_factor is neither in the configuration nor that of a VAE on the hub")
  if has_vae or not loaded:
    loaded, sizes = {}, _vae_sizes(file, tokenizer_names.VAE_PREFIX) | {"norm_groups": options.vae_norm_num_groups}
  if sizes["latent_channels"] != vae["latent_channels"]:
    raise ValueError(
      f"{file.path}: the configuration's vae.latent_channels is {vae['latent_channels']}, "
      f"the weights have {sizes['latent_channels']}"
    )
  vae |= sizes
  parts = [settings[half] for half in ("encoder", "decoder")]
  sides = (part["patch_size"] * min(part["max_grid"], part["max_grid_width"] or part["max_grid"]) for part in parts)
  settings["image_size"] = min(_LATENT_SIDE, *sides) * 2 ** (len(vae["block_out_channels"]) - 1)
  if settings["tokens"]["layout"] == "grid":
    settings["tokens"]["num_registers"] = grid_tokens(derive(**settings))
  config = options.apply(settings)
  with reading.named_config_errors(file.path):
    tables = tokenizer_names.fixed_tables(make_model(config), roles)
  entries_of = lambda shapes: diffusers.with_old_names(tokenizer_names.entries(shapes, roles), file.shapes)
  return config, reading.read_params(file, config, options, entries_of, tables, loaded)


def _load_diffusers(file: Tensors, vae: dict, options: reading.Options) -> tuple[ConfigDict, dict]:
  for name, size in _vae_sizes(file, "").items():
    if vae[name] != size:
      raise ValueError(f"{file.path}: {name} is {vae[name]} in config.json and {size} in the weights")
  settings = dict(
    stage="vae",
    seed=0,
    image_size=256,
    dtype="float32",
    vae=vae,
    vae_loss=dict(l1_weight=1.0, l2_weight=0.0, kl_weight=1e-6),
  )
  config = options.apply(settings)
  entries = lambda shapes: (diffusers.entry(path, shape) for path, shape in shapes.items())
  return config, reading.read_params(
    file, config, options, lambda shapes: diffusers.with_old_names(entries(shapes), file.shapes)
  )


def _vae_sizes(file: Tensors, prefix: str) -> dict:
  with named(file.path):
    return diffusers.read_sizes({k[len(prefix) :]: v for k, v in file.shapes.items() if k.startswith(prefix)})
