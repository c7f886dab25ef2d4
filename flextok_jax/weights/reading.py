"""The options of loading, and a model's parameters from a file that must have their tensors and no others."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np

from flextok_jax import stages
from flextok_jax.config import TOKENIZER_STAGES, derive, float_dtype
from flextok_jax.core import tensor_file
from flextok_jax.core.tensor_file import Tensors, named
from flextok_jax.stages.tokenizer import grid_tokens, with_positions
from flextok_jax.weights import layout
from flextok_jax.weights.layout import Entry, Shape

_UNUSED = ("vae.logvar",)  # of the official trainer's loss


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of loading.load."""

  param_dtype: str | None
  dtype: str | None
  vae_norm_num_groups: int
  mup_base_width: int | None
  image_size: int | None
  mesh: jax.sharding.Mesh | None
  revision: str | None = None
  subfolder: str = ""
  posemb_scaling: str | None = None
  vae_tile: int | None = None

  def __post_init__(self):
    for name in ("param_dtype", "dtype"):
      if getattr(self, name) is not None:
        float_dtype(name, getattr(self, name))
    for name in ("vae_norm_num_groups", "mup_base_width", "image_size"):
      value = getattr(self, name)
      if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

  def apply(self, config: Mapping) -> ConfigDict:
    """Returns a whole config with the compute type and the image size that the options ask for."""
    found = derive(**config)
    if self.posemb_scaling:
      if found.stage not in TOKENIZER_STAGES:
        raise ValueError(
          f"posemb_scaling={self.posemb_scaling!r:.80}: a model of stage {found.stage!r} has no positions"
        )
      found = with_positions(found, self.posemb_scaling).unlock()
    if self.image_size:
      found.image_size = self.image_size
      if found.tokens.layout == "grid":
        found.tokens.num_registers = grid_tokens(found)
    if self.vae_tile is not None:
      if found.stage == "ar" or found.vae.kind == "pixels":
        raise ValueError(f"vae_tile={self.vae_tile} has no effect, as this model has no VAE: leave it out")
      found.vae.tile = self.vae_tile
    if self.dtype:
      found.dtype = jnp.dtype(self.dtype).name
    return found.lock()

  def dtype_of(self, dtype: str, vae_dtype: str) -> Callable[[str], np.dtype]:
    """Returns a function from the path of an array to its type, for a model that computes in these types."""
    types = {name: self.param_dtype or default for name, default in (("dtype", dtype), ("vae.dtype", vae_dtype))}
    stored = "param_dtype"  # arrays may have a type in which nothing is computed
    found = {name: np.dtype(float_dtype(stored, value)) for name, value in types.items()}
    return lambda path: found["vae.dtype" if path.startswith("vae/") else "dtype"]


def read_params(
  file: Tensors,
  config: ConfigDict,
  options: Options,
  entries_of: Callable[[Mapping[str, Shape]], Iterable[Entry]],
  tables: Mapping[str, tuple] | None = None,
  loaded: dict[str, dict] | None = None,
) -> dict:
  """Reads a model's parameters from a file that must have their tensors and no others.

  Args:
    file: with the tensors.
    config: of the model.
    options: of load.
    entries_of: from {path: shape} of the parameters to their entries.
    tables: {name: (type, shape, function that returns the table)} that the file must hold and that are not parameters.
    loaded: top-level parts that are loaded already and not in the file.
  """
  tables, loaded = tables or {}, loaded or {}
  _check_sizes(file, config)
  for name, (_, shape, _) in tables.items():
    if file.shapes.get(name, shape) != shape:
      raise ValueError(f"{file.path}: {name} has shape {list(file.shapes[name])}, expected {list(shape)}")
  with named_config_errors(file.path):
    trained, frozen = init_shapes(FrozenConfigDict(config))
  boxed = {name: part for name, part in {**trained, **frozen}.items() if name not in loaded}
  entries = list(entries_of(layout.shapes_of(boxed)))

  # Check everything before reading.
  wanted = [name for e in entries for name in e.names]
  tensor_file.check_names(file.path, file.shapes, [*wanted, *tables], _UNUSED)
  dtype_of = options.dtype_of(config.dtype, config.vae.dtype)
  with named(file.path):
    for e in entries:
      for name in e.names:
        e.check_shape(name, file.shapes[name])
    for name, (_, _, make) in tables.items():
      if gap := layout.table_error(file, name, make()):
        raise ValueError(f"{name} differs by {gap:.2g} from the sin-cos table that its configuration names")
    arrays = layout.read_arrays(entries, file.read, dtype_of, layout.placements(boxed, options.mesh))
  file.verify()
  return arrays | loaded


_SIZES = {  # of a model of each stage, for each of which there is an axis of a tensor, or a tensor
  "tokenizer": ("encoder.width", "encoder.depth", "decoder.width", "decoder.depth", "tokens.num_registers"),
  "ar": ("ar.width", "ar.depth", "ar.num_ids", "ar.num_tokens"),
  "vae": ("vae.latent_channels", "vae.layers_per_block"),
}


def _check_sizes(file: Tensors, config: ConfigDict):
  """Raises ValueError if the config describes a larger model than a file can hold, before the model is built."""
  largest = max([len(file.shapes), *(size for shape in file.shapes.values() for size in shape)])
  for name in _SIZES.get(config.stage, ()):
    section, field = name.split(".")
    if config[section][field] > largest:
      raise ValueError(
        f"{file.path}: {name} is {config[section][field]} in its config, but its tensors have at most {largest} on "
        "an axis: its config is damaged or of another file"
      )


@functools.lru_cache(maxsize=64)
def init_shapes(config: FrozenConfigDict) -> tuple[dict, dict]:
  """Returns the (trained, frozen) parameters of a model as shapes, boxed with their logical axes."""
  return jax.eval_shape(stages.make_stage(config).init, jax.random.key(0))


@contextlib.contextmanager
def named_config_errors(origin: str) -> Iterator[None]:
  """Turns any error of a model that cannot be built into a ValueError that names the origin of its config."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError):  # of the machine, not of the config
    raise
  except Exception as e:  # a config made by hand can be wrong in any way
    raise ValueError(f"{origin}: its config describes no model ({type(e).__name__}: {e})") from e
