"""Weights from wherever they are: our files and workdirs, official FlexTok checkpoints, diffusers' autoencoders.

Nothing that a file names is imported or called: configurations are parsed against a whitelist (official_config.py), and
every tensor must have a place of its shape. Arrays come one by one, straight to their type and place.
"""

from collections.abc import Mapping
import dataclasses
import functools
import os

from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np

from flextok_jax import stages
from flextok_jax.config import derive, float_dtype, parse_config, read_config, with_fields
from flextok_jax.core import hub, tensor_file
from flextok_jax.core.tensor_file import TensorFile, named
from flextok_jax.ops import posemb
from flextok_jax.parallel import sharding
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.weights import names, orbax
from flextok_jax.weights.official import diffusers as diffusers_config
from flextok_jax.weights.official import tokenizer as official_config

CONFIG_KEY = "flextok_jax.config"  # metadata entry of our weights files
WEIGHTS = "weights.safetensors"  # of our folders
_LATENT_SIDE = 32  # latent pixels a side that the authors' code decodes by default
_UNUSED = ("vae.logvar",)  # of the official trainer's loss


def load(
  source: str | os.PathLike,
  *,
  param_dtype: str | None = "float32",
  dtype: str | None = None,
  vae_norm_num_groups: int = 32,
  mup_base_width: int | None = None,
  image_size: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[ConfigDict, dict]:
  """Loads a model.

  Args:
    source: a weights file, a run's workdir or a folder of ours; an official .safetensors file, or folder of config.json
      and model.safetensors; a folder of diffusers' AutoencoderKL; or a repository of the Hugging Face hub.
    param_dtype: type of all arrays; None: of each part the type it computes in.
    dtype: compute type in place of the checkpoint's, the VAE's aside (official checkpoints: float32).
    vae_norm_num_groups: groups of the VAE's GroupNorms, which official files do not tell.
    mup_base_width: base width of official models trained with a muP readout, which their files do not tell.
    image_size: pixels a side in place of the checkpoint's own; official files do not tell it either, the authors' code
      takes 32 latent pixels a side (256 px), or fewer where the position table ends before.
    mesh: devices to place the arrays on by their logical axes; None: the default device.

  Returns:
    (config, params). Of a folder with orbax checkpoints the newest average.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: a damaged, foreign or unsupported file; the line names what is wrong.
  """
  source = os.fspath(source)
  options = _Options(param_dtype, dtype, vae_norm_num_groups, mup_base_width, image_size, mesh)
  if os.path.isdir(source):
    return _load_folder(source, options)
  if os.path.isfile(source):
    return _load_file(source, options)
  if hub.is_repository(source):
    return _load_pair(*hub.fetch(source), options)
  raise FileNotFoundError(f"no such checkpoint: {source}; give a file, a folder or a repository on Hugging Face")


def load_config(source: str | os.PathLike) -> ConfigDict:
  """Returns the config of what load takes, without reading the arrays of our own formats; raises as load does."""
  source = os.fspath(source)
  if os.path.isdir(os.path.join(source, "checkpoints")):
    config = read_config(source)
    return with_fields(config, orbax.restore_average(source, {}, {}, _is_measured(config))[1])
  path = os.path.join(source, WEIGHTS) if os.path.isdir(source) else source
  if is_ours(path):
    return parse_config(TensorFile(path).metadata[CONFIG_KEY], path)
  return load(source)[0]


def _is_measured(config: ConfigDict) -> bool:
  """Whether a run of this config measures fields of it, and keeps them with its checkpoints (evals/make.py)."""
  return config.stage == "vae" and not config.vae.scaling_factor


def is_ours(source: str | os.PathLike) -> bool:
  """Whether an existing path is a workdir, folder or weights file of ours, and not in another program's format."""
  if os.path.isdir(source):
    return any(os.path.exists(os.path.join(source, name)) for name in (WEIGHTS, "checkpoints"))
  return os.path.isfile(source) and CONFIG_KEY in TensorFile(source).metadata


@dataclasses.dataclass(frozen=True)
class _Options:
  param_dtype: str | None
  dtype: str | None
  vae_norm_num_groups: int
  mup_base_width: int | None
  image_size: int | None
  mesh: jax.sharding.Mesh | None

  def __post_init__(self):
    for name in ("param_dtype", "dtype"):
      if getattr(self, name) is not None:
        float_dtype(name, getattr(self, name))
    for name in ("vae_norm_num_groups", "mup_base_width", "image_size"):
      value = getattr(self, name)
      if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

  def config(self, config: Mapping) -> ConfigDict:
    """Returns the config with the compute type and the image size asked for."""
    config = derive(**config)
    if self.image_size:
      config.image_size = self.image_size
    if self.dtype:
      config.dtype = jnp.dtype(self.dtype).name
    return config.lock()

  def type_of(self, path: str, config: ConfigDict) -> np.dtype:
    """Returns the type of the array at `path`."""
    if self.param_dtype:
      return np.dtype(float_dtype("param_dtype", self.param_dtype))
    if path.startswith("vae/"):
      return np.dtype(float_dtype("vae.dtype", config.vae.dtype))
    return np.dtype(float_dtype("dtype", config.dtype))


def _load_folder(folder: str, options: _Options) -> tuple[ConfigDict, dict]:
  inside = functools.partial(os.path.join, folder)
  config = inside(hub.CONFIG)
  if os.path.isfile(inside(WEIGHTS)) and not os.path.isdir(inside("checkpoints")):
    return _load_file(inside(WEIGHTS), options)
  for name in hub.WEIGHTS:
    if os.path.isfile(inside(name)):
      if os.path.isfile(config):
        return _load_pair(config, inside(name), options)
      return _load_file(inside(name), options)
  if os.path.isfile(config):
    return _load_workdir(folder, options)
  raise FileNotFoundError(
    f"folder {folder} holds no checkpoint: neither {WEIGHTS}, {', '.join(hub.WEIGHTS)} nor a run's config.json"
  )


def _load_workdir(folder: str, options: _Options) -> tuple[ConfigDict, dict]:
  config = options.config(read_config(folder))
  trained, frozen, shardings = _abstract(config, folder, options.mesh)
  typed = lambda tree: unflatten_dict(
    {
      path: jax.ShapeDtypeStruct(x.shape, options.type_of("/".join(path), config), sharding=shardings["/".join(path)])
      for path, x in flatten_dict(tree).items()
    }
  )
  params, measured = orbax.restore_average(folder, typed(trained), typed(frozen), _is_measured(config))
  return with_fields(config, measured), params


def _load_file(path: str, options: _Options) -> tuple[ConfigDict, dict]:
  file = TensorFile(path)
  if CONFIG_KEY in file.metadata:
    config = options.config(parse_config(file.metadata[CONFIG_KEY], path))
    return config, _read(file, config, {}, options, names.own_entry)
  if any(name.startswith("models.ar_image_model.") for name in file.shapes):
    raise ValueError(f"{path} holds a generator: load it by flextok_jax.load_ar, convert it with --generator")
  if "encoder" not in file.metadata:
    raise ValueError(
      f"{path} is no FlexTok checkpoint: its metadata has neither {CONFIG_KEY!r} nor an official configuration; "
      "where the weights came with a config.json, give the folder of both"
    )
  with named(path):
    official = official_config.parse_literals(file.metadata)
  return _load_official(file, official, options)


def _load_pair(config_path: str, path: str, options: _Options) -> tuple[ConfigDict, dict]:
  """A configuration and weights apart, as on the hub: of a tokenizer, or of diffusers' autoencoder."""
  try:
    with open(config_path, encoding="utf-8") as f:
      config = official_config.parse_json(f.read(), config_path)
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f"{config_path} cannot be read: {e}") from None
  file = TensorFile(path)
  if "_class_name" in config or "block_out_channels" in config:
    with named(config_path):
      vae = diffusers_config.from_diffusers(config)
    return _load_diffusers(file, vae, options)
  return _load_official(file, config, options)


def _load_official(file: TensorFile, official: Mapping, options: _Options) -> tuple[ConfigDict, dict]:
  with named(file.path):
    config, roles = official_config.from_official(official, mup_base_width=options.mup_base_width)
  vae, hub_id = config["vae"], config["vae"].pop("hub_id")
  inside = any(name.startswith(names.VAE_PREFIX) for name in file.shapes)
  other = {}
  if hub_id and not (inside and vae["scaling_factor"] is not None):
    if not hub.is_repository(hub_id):
      raise ValueError(f"{file.path}: vae.hf_hub_path {hub_id!r:.80} is no repository of the Hugging Face hub")
    own = dataclasses.replace(options, param_dtype=options.param_dtype or vae["dtype"], image_size=None)
    other_config, other = _load_pair(*hub.fetch(hub_id), own)
    if other_config.stage != "vae":
      raise ValueError(f"{file.path}: vae.hf_hub_path {hub_id} is no autoencoder")
    vae["scaling_factor"] = vae["scaling_factor"] or other_config.vae.scaling_factor
  if vae["scaling_factor"] is None:
    raise ValueError(f"{file.path}: vae.scaling_factor is neither in the configuration nor that of a VAE on the hub")
  if inside or not other:
    other, sizes = {}, _vae_sizes(file, names.VAE_PREFIX) | {"norm_groups": options.vae_norm_num_groups}
  else:
    told = ("latent_channels", "block_out_channels", "layers_per_block", "norm_groups")
    sizes = {k: other_config.vae[k] for k in told}
  if sizes["latent_channels"] != vae["latent_channels"]:
    raise ValueError(
      f"{file.path}: the configuration's vae.latent_channels is {vae['latent_channels']}, "
      f"the weights have {sizes['latent_channels']}"
    )
  vae |= sizes
  side = min(_LATENT_SIDE, *(config[half]["max_grid"] * config[half]["patch_size"] for half in ("encoder", "decoder")))
  config["image_size"] = side * 2 ** (len(vae["block_out_channels"]) - 1)
  config = options.config(config)
  return config, _read(file, config, roles, options, given=other)


def _load_diffusers(file: TensorFile, vae: dict, options: _Options) -> tuple[ConfigDict, dict]:
  sizes = _vae_sizes(file, "")
  for name, size in sizes.items():
    if vae[name] != size:
      raise ValueError(f"{file.path}: {name} is {vae[name]} in config.json and {size} in the weights")
  config = options.config(
    dict(
      stage="vae",
      seed=0,
      image_size=256,
      dtype="float32",
      vae=vae,
      vae_loss=dict(l1_weight=1.0, l2_weight=0.0, kl_weight=1e-6),
    )
  )
  return config, _read(file, config, {}, options, vae_prefix="")


def _vae_sizes(file: TensorFile, prefix: str) -> dict:
  try:
    return names.vae_sizes({k[len(prefix) :]: v for k, v in file.shapes.items() if k.startswith(prefix)})
  except ValueError as e:
    raise ValueError(f"{file.path}: {e}") from None


def _read(
  file: TensorFile,
  config: ConfigDict,
  roles: Mapping[str, str],
  options: _Options,
  entry=None,
  *,
  vae_prefix: str = names.VAE_PREFIX,
  given: Mapping = {},
) -> dict:  # noqa: B006 never changed
  """Returns the parameters that config asks for, from the file's tensors; `given` are there already."""
  trained, frozen, shardings = _abstract(config, file.path, options.mesh)
  shapes = {path: x.shape for path, x in flatten_dict({**trained, **frozen}, sep="/").items()}
  shapes = {path: shape for path, shape in shapes.items() if path.split("/")[0] not in given}
  if entry is None:
    old = any(".attentions.0.query." in name for name in file.shapes)
    entries = list(names.entries(shapes, roles, vae_prefix, old))
  else:
    entries = [entry(path, shape) for path, shape in shapes.items()]
  tables = dict(fixed_tables(config, roles)) if roles else {}
  wanted = [name for e in entries for name in e.names]
  tensor_file.check_names(file.path, file.shapes, [*wanted, *tables], _UNUSED)
  for e in entries:
    shape = e.official_shape
    for name in e.names:
      if file.shapes[name] != shape:
        raise ValueError(
          f"{file.path}: {name} has shape {list(file.shapes[name])}, its configuration asks for {list(shape)}"
        )
  for name, table in tables.items():
    _check_table(file, name, table)

  flat = {}
  # The largest first: beside it stands a copy where jax makes one, and the others are not there yet.
  for e in sorted(entries, key=lambda e: -np.prod(e.shape)):
    array = tensor_file.empty(e.shape, options.type_of(e.path, config))
    for i, name in enumerate(e.names):
      e.from_official(file.read(name), array, i)
    flat[e.path] = jax.block_until_ready(jax.device_put(array, shardings[e.path]))
    del array
  params = unflatten_dict({path: flat[path] for path in shapes}, sep="/")
  return {**params, **given}


def fixed_tables(config: ConfigDict, roles: Mapping[str, str]):
  """Yields (official name, table [1, d, g, g]) of the sin-cos tables, which official files store and we compute."""
  model = make_model(config)
  for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
    if part.posemb == "sincos":
      table = posemb.grid_table(posemb.sincos_axes(part.max_grid, part.width), part.max_grid, part.max_grid)
      yield f"{roles[f'{name}/positions']}.posembs", np.asarray(table, np.float32).transpose(2, 0, 1)[None]


def _check_table(file: TensorFile, name: str, table: np.ndarray):
  """Raises ValueError where a stored table is another than the sin-cos table (up to rounding to its type)."""
  if file.shapes[name] != table.shape:
    raise ValueError(f"{file.path}: {name} has shape {list(file.shapes[name])}, expected {list(table.shape)}")
  stored = file.read(name).astype(np.float32)
  gap = np.abs(stored - table).max()
  if not gap <= max(2 * float(jnp.finfo(file.dtypes[name]).eps), 1e-4):
    raise ValueError(f"{file.path}: {name} differs by {gap:.2g} from the sin-cos table that its configuration names")


def _abstract(config: ConfigDict, origin: str, mesh):
  """Returns the (trained, frozen) abstract arrays of the model that a config describes, and {path: sharding}."""
  try:
    trained, frozen = _boxed(FrozenConfigDict(config))
  except Exception as e:  # a hand-made config can be wrong in any way
    raise ValueError(f"{origin}: its config describes no model ({type(e).__name__}: {e})") from e
  both = unbox({**trained, **frozen})
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: device, both)
  else:
    shardings = sharding.tree_shardings({**trained, **frozen}, mesh)
  return unbox(trained), unbox(frozen), flatten_dict(shardings, sep="/")


@functools.lru_cache(maxsize=8)
def _boxed(config: FrozenConfigDict):
  return jax.eval_shape(stages.make_stage(config).init, jax.random.key(0))


def abstract_params(config: ConfigDict) -> dict:
  """Returns the parameters that a config describes, as shapes."""
  trained, frozen = _boxed(FrozenConfigDict(config))
  return unbox({**trained, **frozen})
