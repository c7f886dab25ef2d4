"""The device mesh, and the shardings of batches and parameters."""

import collections
from collections.abc import Generator, Iterator, Mapping, Sequence
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from flextok_jax.ops import layout

AXES = ("data", "fsdp", "tensor")
# Bytes: parameters up to this size are not sharded over "fsdp". Gathering biases and scales before each use would cost
# more time than the little memory is worth.
SMALL = 2**20


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Returns a device mesh with AXES, by default with all devices along "data".

  Neighbours along "tensor", and then along "fsdp", are the closest devices: chips of a slice, GPUs of a node.

  Args:
    data: size of the axis "data". One of data, fsdp and tensor may be -1: the remaining devices.
    fsdp: size of the axis "fsdp".
    tensor: size of the axis "tensor".
    slices: number of slices, only the axis "data" crosses them; None: as found.
    devices: of the mesh; None: all devices of this run.

  Raises:
    ValueError: the sizes do not suit the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  found = len({getattr(device, "slice_index", 0) for device in devices})
  slices = found if slices is None else slices
  data, fsdp, tensor = axis_sizes(data, fsdp, tensor, len(devices))
  if slices == 1:
    if found > 1 and devices[0].platform == "tpu":
      raise ValueError(f"these devices are {found} slices: set slices={found}")
    make = lambda: mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
  else:
    if not isinstance(slices, int) or slices < 1 or data % slices:
      raise ValueError(f"data={data} is not divisible by slices={slices}")
    inner, outer = (data // slices, fsdp, tensor), (slices, 1, 1)
    by_process = not hasattr(devices[0], "slice_index")
    make = lambda: mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )
  try:
    return Mesh(make(), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  except (ValueError, NotImplementedError) as e:
    sizes = f"data={data}, fsdp={fsdp}, tensor={tensor}, slices={slices}"
    raise ValueError(f"a mesh of {sizes} does not suit these {len(devices)} devices: {e}") from e


def axis_sizes(data: int, fsdp: int, tensor: int, count: int) -> list[int]:
  """Returns the sizes of AXES for `count` devices, -1 replaced; ValueError if they do not suit."""
  sizes = data, fsdp, tensor
  text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
  if any(not isinstance(size, int) or size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
    raise ValueError(f"a mesh of {text}: sizes are at least 1, and one of them may be -1, for the rest")
  known = math.prod(size for size in sizes if size != -1)
  if count % known or (-1 not in sizes and known != count):
    raise ValueError(f"a mesh of {text} does not match the {count} devices of this run: -1 means the rest")
  return [count // known if size == -1 else size for size in sizes]


def batch_parts(mesh: Mesh) -> int:
  """Returns the number of shards of the batch on a mesh."""
  return layout.batch_parts(mesh.shape)


def check_batch(global_batch: int, accumulate_steps: int, mesh: Mesh) -> None:
  """Raises ValueError if the batch is not divisible by accumulate_steps times the shards of the batch."""
  parts = accumulate_steps * batch_parts(mesh)
  if global_batch < 1 or global_batch % parts:
    raise ValueError(
      f"global_batch={global_batch} is not divisible by {batch_parts(mesh)} devices x accumulate_steps="
      f"{accumulate_steps} (devices along the axes data and fsdp): use a multiple of {parts}"
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays [b, ...]; b must be divisible by batch_parts."""
  return NamedSharding(mesh, P(tuple(axis for axis in layout.RULES["batch"] if axis in mesh.shape)))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, P())


def tree_shardings(abstract: Any, mesh: Mesh, over_data: bool = False) -> Any:
  """Returns the NamedSharding of each leaf of an abstract tree, boxed with its logical axes or not.

  By layout.RULES, except that arrays up to SMALL are not sharded over "fsdp"; for larger ones that the rules do not
  shard over it, the largest divisible dimension is, "layers" only as a last resort, as a scan slices it. With over_data
  these arrays are then sharded over "data" in the same way: for what the forward and backward pass do not read.
  """

  def place(leaf):  # a box may be empty: of a parameter that another part of the optimiser holds
    names = getattr(leaf, "names", None)
    spec = lambda x: P(*(axes or None for axes in _parameter_axes(x, names, mesh.shape, over_data)))
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), nn.meta.unbox(leaf))

  return jax.tree.map(place, abstract, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def part_sizes(abstract: Any, sizes: Mapping[str, int], over_data: bool = False) -> Any:
  """Returns how many numbers of each leaf of an abstract tree are on a device, as tree_shardings places it.

  Args:
    abstract: see tree_shardings.
    sizes: of the axes of a mesh, whose devices need not exist; missing ones have size 1.
    over_data: see tree_shardings.
  """

  def size(x, names):
    axes = itertools.chain(*_parameter_axes(x, names, sizes, over_data))
    return math.prod(x.shape) // math.prod(sizes[axis] for axis in axes)

  def measure(leaf):
    names = getattr(leaf, "names", None)
    return jax.tree.map(lambda x: size(x, names), nn.meta.unbox(leaf))

  return jax.tree.map(measure, abstract, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def _parameter_axes(
  x: jax.ShapeDtypeStruct, names: Sequence[str | None] | None, sizes: Mapping[str, int], over_data: bool
) -> list[tuple[str, ...]]:
  """Returns the mesh axes of each dimension of a parameter."""
  names = (None,) * x.ndim if names is None else names
  small = math.prod(x.shape) * x.dtype.itemsize <= SMALL
  sizes = {axis: size for axis, size in sizes.items() if axis != "fsdp" or not small}
  parts = layout.split(names, x.shape, sizes)
  for axis in ("fsdp", "data") if over_data and not small else ("fsdp",):
    size = sizes.get(axis, 1)
    if size == 1 or any(axis in axes for axes in parts):
      continue
    rest = [length // math.prod(sizes[axis] for axis in axes) for length, axes in zip(x.shape, parts)]
    places = [i for i, length in enumerate(rest) if length % size == 0]
    if places:
      best = max(places, key=lambda i: (names[i] != "layers", rest[i]))
      parts[best] += (axis,)
  return parts


def place(tree: Any, sharding: NamedSharding | None) -> Any:
  """Puts a tree of arrays on devices.

  Args:
    tree: of arrays that every process holds whole, or that are on all devices already.
    sharding: of all arrays; None: on the default device.
  """

  def put(x):
    if sharding is None or sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
      return jax.device_put(x, sharding)
    x = np.asarray(x)  # device_put would gather the copies of all processes to compare them
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(put, tree)


def process_blocks(mesh: Mesh, process_index: int | None = None) -> tuple[list[int], int]:
  """Returns which rows of a batch the devices of a process need, as (blocks, count).

  The batch consists of `count` equal blocks of consecutive rows, of which the process needs `blocks`, ascending. If
  "tensor" spans several processes, these need the same blocks.
  """
  process = jax.process_index() if process_index is None else process_index
  count = batch_parts(mesh)
  indices: Mapping[jax.Device, Any] = batch_sharding(mesh).devices_indices_map((count,))
  needed = sorted({index[0].indices(count)[0] for device, index in indices.items() if device.process_index == process})
  for size in range(len(needed), 0, -1):  # as large blocks as possible
    blocks = sorted({i // size for i in needed})
    if count % size == 0 and len(blocks) * size == len(needed):
      return blocks, count // size
  raise ValueError(f"process {process} has no device of the mesh")


def device_batches(batches: Iterator[dict], sharding: NamedSharding, ahead: int = 2) -> Generator[dict]:
  """Turns batches of the rows that this process needs (process_blocks) into global arrays.

  `ahead` batches are transferred to the devices while one is used.
  """
  place = lambda batch: {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
  batches = iter(batches)
  queue = collections.deque(place(batch) for batch in itertools.islice(batches, ahead))
  while queue:
    yield queue.popleft()
    queue.extend(place(batch) for batch in itertools.islice(batches, 1))
