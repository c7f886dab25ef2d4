"""Devices, and where arrays live on them."""

import collections
from collections.abc import Iterator
import itertools

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

# Logical axis -> mesh axis. The batch is split over "data"; every parameter axis is replicated.
RULES = (("batch", "data"),)


def make_mesh(mesh: ConfigDict) -> Mesh:
  """Returns the device mesh of config.mesh.

  Raises:
    ValueError: when the devices do not divide into it.
  """
  devices = jax.device_count()
  data = devices if mesh.data == -1 else mesh.data
  if data != devices:
    raise ValueError(f"config.mesh.data={mesh.data} does not match the {devices} devices of this run: use -1 for all")
  return jax.make_mesh((data,), ("data",), axis_types=(AxisType.Auto,))


def check_batch(global_batch: int, accumulate_steps: int, mesh: Mesh):
  """Raises ValueError when a part of the batch does not divide over the devices."""
  parts = accumulate_steps * mesh.shape["data"]
  if global_batch < 1 or global_batch % parts:
    raise ValueError(
        f"config.data.global_batch={global_batch} is not divisible by {mesh.shape['data']} devices x "
        f"optim.accumulate_steps={accumulate_steps}: use a multiple of {parts}"
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch",), RULES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def tree_shardings(abstract, mesh: Mesh):
  """Returns the NamedSharding of each leaf of a boxed abstract tree, by its logical axes and RULES."""

  def place(leaf):  # a box may be empty: of a parameter that this part of the optimiser leaves to another
    axes = nn.logical_to_mesh_axes(getattr(leaf, "names", ()), RULES)
    return jax.tree.map(lambda _: NamedSharding(mesh, axes), nn.meta.unbox(leaf))

  return jax.tree.map(place, abstract, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def device_batches(batches: Iterator[dict], sharding: NamedSharding, ahead: int = 2) -> Iterator[dict]:
  """Turns local batches into global arrays, `ahead` of them on their way to the devices while one is used."""
  place = lambda batch: {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
  batches = iter(batches)
  queue = collections.deque(place(batch) for batch in itertools.islice(batches, ahead))
  while queue:
    yield queue.popleft()
    queue.extend(place(batch) for batch in itertools.islice(batches, 1))
