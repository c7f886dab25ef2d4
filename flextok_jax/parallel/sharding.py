"""Devices, and where arrays live on them."""

import collections
from collections.abc import Iterator, Sequence
import itertools
import math

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
import numpy as np

from flextok_jax.ops import layout

AXES = ("data", "fsdp", "tensor")
# Bytes: parameters up to this size stay whole under "fsdp". Fetching biases and scales from all sides before each use
# would cost more time than the little memory is worth.
SMALL = 2**20


def make_mesh(mesh: ConfigDict | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the device mesh of config.mesh, by default one with all devices along "data".

  Neighbours along "tensor" and then "fsdp" are the closest: chips of a slice, GPUs of a node.

  Args:
    mesh: sizes of AXES, of which one may be -1, for the devices that are left; and the number of slices.
    devices: default: all of this run.

  Raises:
    ValueError: when the devices do not divide into it.
  """
  devices = jax.devices() if devices is None else list(devices)
  found = len({getattr(device, "slice_index", 0) for device in devices})
  if mesh is None:
    mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, slices=found))
  data, fsdp, tensor = _sizes(mesh, len(devices))
  if mesh.slices == 1:
    if found > 1 and devices[0].platform == "tpu":
      raise ValueError(f"these devices are {found} slices: give --config.mesh.slices={found}")
    make = lambda: mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
  else:
    if not isinstance(mesh.slices, int) or mesh.slices < 1 or data % mesh.slices:
      raise ValueError(f"config.mesh.data={data} is not divisible by config.mesh.slices={mesh.slices}")
    inner, outer = (data // mesh.slices, fsdp, tensor), (mesh.slices, 1, 1)
    by_process = not hasattr(devices[0], "slice_index")
    make = lambda: mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )
  try:
    return Mesh(make(), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  except (ValueError, NotImplementedError) as e:
    sizes = f"data={data}, fsdp={fsdp}, tensor={tensor}, slices={mesh.slices}"
    raise ValueError(f"config.mesh of {sizes} does not suit these {len(devices)} devices: {e}") from e


def _sizes(mesh: ConfigDict, count: int) -> list[int]:
  """Returns the sizes of AXES, -1 replaced."""
  sizes = [mesh[axis] for axis in AXES]
  told = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
  if any(not isinstance(size, int) or size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
    raise ValueError(f"config.mesh of {told}: sizes are at least 1, and one of them may be -1, for the rest")
  known = math.prod(size for size in sizes if size != -1)
  if count % known or (-1 not in sizes and known != count):
    raise ValueError(f"config.mesh of {told} does not match the {count} devices of this run: -1 stands for the rest")
  return [count // known if size == -1 else size for size in sizes]


def batch_parts(mesh: Mesh) -> int:
  """Returns into how many parts a mesh divides the batch."""
  return math.prod(mesh.shape.get(axis, 1) for axis in layout.RULES["batch"])


def check_batch(global_batch: int, accumulate_steps: int, mesh: Mesh):
  """Raises ValueError when a part of the batch does not divide over the devices."""
  parts = accumulate_steps * batch_parts(mesh)
  if global_batch < 1 or global_batch % parts:
    raise ValueError(
      f"config.data.global_batch={global_batch} is not divisible by {batch_parts(mesh)} devices x "
      f"optim.accumulate_steps={accumulate_steps} (devices along mesh.data and mesh.fsdp): use a multiple of {parts}"
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the placement of arrays [b, ...]; b must be divisible by batch_parts."""
  return NamedSharding(mesh, P(tuple(axis for axis in layout.RULES["batch"] if axis in mesh.shape)))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def tree_shardings(abstract, mesh: Mesh):
  """Returns the NamedSharding of each leaf of an abstract tree, boxed with its logical axes or not.

  By layout.RULES; but "fsdp" has nothing of arrays up to SMALL, and of all others the largest dimension that divides,
  if the rules find it no place: "layers" last, which a scan takes apart.
  """

  def place(leaf):  # a box may be empty: of a parameter that this part of the optimiser leaves to another
    names = getattr(leaf, "names", None)
    return jax.tree.map(lambda x: NamedSharding(mesh, _parameter_spec(x, names, mesh)), nn.meta.unbox(leaf))

  return jax.tree.map(place, abstract, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def _parameter_spec(x: jax.ShapeDtypeStruct, names: Sequence[str | None] | None, mesh: Mesh) -> P:
  names = (None,) * x.ndim if names is None else names
  small = math.prod(x.shape) * x.dtype.itemsize <= SMALL
  sizes = {axis: size for axis, size in mesh.shape.items() if axis != "fsdp" or not small}
  parts, fsdp = layout.split(names, x.shape, sizes), sizes.get("fsdp", 1)
  if fsdp > 1 and not any("fsdp" in axes for axes in parts):
    rest = [length // math.prod(sizes[axis] for axis in axes) for length, axes in zip(x.shape, parts)]
    places = [i for i, length in enumerate(rest) if length % fsdp == 0]
    if places:
      best = max(places, key=lambda i: (names[i] != "layers", rest[i]))
      parts[best] += ("fsdp",)
  return P(*(axes or None for axes in parts))


def place(tree, sharding: NamedSharding | None):
  """Puts arrays of which every process has the whole, or that are on all devices already, where `sharding` says.

  None: on the default device.
  """

  def put(x):
    if sharding is None or sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
      return jax.device_put(x, sharding)
    x = np.asarray(x)  # device_put would bring the copies of all processes together, to compare them
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(put, tree)


def process_blocks(mesh: Mesh, process_index: int | None = None) -> tuple[list[int], int]:
  """Returns which rows of a batch the devices of a process need, as (blocks, count).

  Of the batch in `count` equal blocks of neighbouring rows they need `blocks`, ascending. Several processes need the
  same where "tensor" goes across them.
  """
  process = jax.process_index() if process_index is None else process_index
  count = batch_parts(mesh)
  indices = batch_sharding(mesh).devices_indices_map((count,))
  needed = sorted({index[0].indices(count)[0] for device, index in indices.items() if device.process_index == process})
  for size in range(len(needed), 0, -1):  # blocks as large as they can be
    blocks = sorted({i // size for i in needed})
    if count % size == 0 and len(blocks) * size == len(needed):
      return blocks, count // size
  raise ValueError(f"process {process} has no device of the mesh")


def device_batches(batches: Iterator[dict], sharding: NamedSharding, ahead: int = 2) -> Iterator[dict]:
  """Turns batches of the rows that this process needs into global arrays.

  `ahead` of them are on their way to the devices while one is used.
  """
  place = lambda batch: {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
  batches = iter(batches)
  queue = collections.deque(place(batch) for batch in itertools.islice(batches, ahead))
  while queue:
    yield queue.popleft()
    queue.extend(place(batch) for batch in itertools.islice(batches, 1))
