"""Parameter names and layouts in weights files, both ways.

Linear layers of official files are [out, in] and convolutions [out, in, kh, kw]; every block and projection is a tensor
of its own. Ours are [in, out] and [kh, kw, in, out]; blocks are stacked, and q, k and v are one array.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
from typing import Any

from einops import parse_shape, rearrange
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.core import tensor_file
from flextok_jax.core.tensor_file import Tensors
from flextok_jax.parallel import sharding

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One of our arrays and the official tensors that it consists of.

  Attributes:
    path: of our array, "a/b/c".
    shape: of our array.
    names: of the official tensors; by block, then by fused part.
    layout: einops pattern from a part of our array to the official tensor.
    stacked: whether the first axis of our array is the block.
    parts: number of fused parts per block.
    axis: of the fused parts within a block of our array; -1: nothing is fused.
    share: (i, n) if our array is the i-th of n equal parts of the official tensors along their first axis.
  """

  path: str
  shape: Shape
  names: tuple[str, ...]
  layout: str
  stacked: bool = False
  parts: int = 1
  axis: int = -1
  share: tuple[int, int] = (0, 1)

  def view(self, array: np.ndarray, index: int) -> np.ndarray:
    """Returns the part of our array that is the official tensor names[index]; writing to it writes to the array."""
    block, part = divmod(index, self.parts)
    if self.stacked:
      array = array[block]
    return array if self.axis < 0 else np.moveaxis(array, self.axis, 0)[part]

  def to_official(self, array: np.ndarray, index: int) -> np.ndarray:
    """Returns the official tensor names[index] of our array, or the share of it that our array is."""
    return rearrange(self.view(array, index), self.layout)

  def from_official(self, read: Callable[[str], np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Returns our array in a type, made of the official tensors that `read` returns by name, one at a time.

    Raises:
      ValueError: it would not be finite.
    """
    ours, official = self.layout.split(" -> ")
    array = np.empty(0)
    for i, name in enumerate(self.names):
      tensor = read(name)
      if i == 0:  # after the first tensor is read: a wrong config.json may ask for more memory than there is
        array = tensor_file.empty(self.shape, dtype)
      view = self.view(array, i)
      with np.errstate(over="ignore", invalid="ignore"):
        part, parts = self.share
        view[...] = rearrange(np.split(tensor, parts)[part], f"{official} -> {ours}", **parse_shape(view, ours))
      if not np.isfinite(view).all():
        wrong = f"values beyond those of {dtype}" if np.isfinite(tensor).all() else "NaN or infinite values"
        raise ValueError(f"{name} has {wrong}: not usable weights")
    return array

  @property
  def official_shape(self) -> Shape:
    """The shape of each official tensor."""
    length, *rest = self.to_official(np.broadcast_to(np.int8(0), self.shape), 0).shape  # allocates nothing
    return (self.share[1] * length, *rest)

  def check_shape(self, name: str, shape: Shape):
    """Raises ValueError if an official tensor has another shape."""
    if shape != self.official_shape:
      raise ValueError(f"{name} has shape {list(shape)}, expected {list(self.official_shape)}")


def identity_entry(path: str, shape: Shape) -> Entry:
  """Returns the entry of an array in our own files: its path is its name."""
  axes = " ".join(f"a{i}" for i in range(len(shape)))
  return Entry(path, shape, (path,), f"{axes} -> {axes}")


def block_entry(
  path: str, shape: Shape, blocks: str, modules: Iterable[str], suffix: str, layout: str, axis: int = -1
) -> Entry:
  """Returns the entry of an array whose first axis is the block.

  Args:
    path: of our array.
    shape: of our array.
    blocks: prefix of the names of all blocks; their number follows.
    modules: names within a block of what our array consists of, fused along `axis` if there are several.
    suffix: of all names.
    layout: einops pattern from a part of a block of our array to the official tensor.
    axis: of the fused parts within a block of our array.
  """
  modules = tuple(modules)
  names = (f"{blocks}.{i}.{module}{suffix}" for i in range(shape[0]) for module in modules)
  return Entry(path, shape, tuple(names), layout, True, len(modules), axis)


def shapes_of(arrays: Any) -> dict[str, Shape]:
  """Returns {path: shape} of nested arrays, boxed with their logical axes or not."""
  return {path: x.shape for path, x in flatten_dict(unbox(arrays), sep="/").items()}


def placements(boxed: Any, mesh: jax.sharding.Mesh | None) -> dict[str, jax.sharding.Sharding]:
  """Returns {path: sharding} of boxed arrays: by their logical axes on a mesh; without one on the default device."""
  if mesh is not None:
    return flatten_dict(sharding.tree_shardings(boxed, mesh), sep="/")
  return dict.fromkeys(shapes_of(boxed), jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))


def read_arrays(
  entries: Iterable[Entry],
  read: Callable[[str], np.ndarray],
  dtype_of: Callable[[str], np.dtype],
  where: Mapping[str, jax.sharding.Sharding],
) -> dict[str, Any]:
  """Reads arrays one after another, straight to their type and devices.

  Args:
    entries: of our arrays.
    read: from the name of an official tensor to the tensor.
    dtype_of: from the path of an array to its type.
    where: {path: sharding}.

  Returns:
    nested arrays.
  """
  entries, flat = list(entries), {}
  # The largest first: jax may copy it, and the others do not take memory yet.
  for e in sorted(entries, key=lambda e: -math.prod(e.shape)):
    flat[e.path] = jax.block_until_ready(jax.device_put(e.from_official(read, dtype_of(e.path)), where[e.path]))
  return unflatten_dict({e.path: flat[e.path] for e in entries}, sep="/")


def count_series(names: Iterable[str], prefix: str) -> int:
  """Returns how many numbers follow a prefix in names: PREFIX0, PREFIX1, ...

  Raises:
    ValueError: there is none, or one is missing.
  """
  indices = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
  if not indices or indices != {str(i) for i in range(len(indices))}:
    raise ValueError(f"no whole series of tensors {prefix}0, 1, 2, ...")
  return len(indices)


def table_error(file: Tensors, name: str, table: np.ndarray) -> float:
  """Returns the largest difference of a stored table from one of the same shape; 0 if it is within rounding."""
  gap = float(np.abs(file.read(name).astype(np.float64) - table).max())
  return 0.0 if gap <= max(2 * float(jnp.finfo(file.dtypes[name]).eps), 1e-4) else gap  # NaN is returned
