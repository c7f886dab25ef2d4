"""Logical axes: names of array dimensions, and the axes of the device mesh over which each is sharded."""

from collections.abc import Mapping, Sequence
import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Logical axis: mesh axes. All others ("layers", "head_dim", "conv_out", None, ...) are replicated. The batch is sharded
# over "data" and "fsdp", large parameters over "fsdp" (parallel/sharding.py says how large), and the dimensions inside
# a block over "tensor": heads, hidden units, the vocabulary.
RULES: dict[str | None, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "embed": ("fsdp",),
  "conv_in": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "modulation": ("tensor",),
  "embed_out": ("tensor",),
  "vocab": ("tensor",),
}


def split(names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
  """Returns the mesh axes of each dimension of an array by RULES.

  A mesh axis is skipped if the size of the dimension is not divisible by it, or if an earlier dimension uses it.

  Args:
    names: logical axes.
    shape: of the array.
    sizes: of the mesh axes; missing ones have size 1.
  """
  taken: set[str] = set()
  parts: list[tuple[str, ...]] = []
  for name, length in zip(names, shape, strict=True):
    parts.append(())
    for axis in RULES.get(name, ()):
      size = sizes.get(axis, 1)
      if size > 1 and axis not in taken and length % size == 0:
        parts[-1] += (axis,)
        taken.add(axis)
        length //= size
  return parts


def batch_parts(sizes: Mapping[str, int]) -> int:
  """Returns the number of shards of a batch; `sizes` as in split."""
  return math.prod(sizes.get(axis, 1) for axis in RULES["batch"])


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrains the sharding of an intermediate result by the logical axes of its dimensions.

  The mesh is that of the arrays from which x was computed. Without a mesh, outside of jit, or if no dimension of x is
  divisible, x is returned unchanged. The compiler chooses the sharding of named dimensions that are not divisible, but
  a batch of at least half a row per device is padded: otherwise the compiler would split the products of layers whose
  parameters are sharded over "fsdp", and sum their results over devices, which are larger than the parameters.
  """
  mesh = _mesh(x)
  if mesh is None:
    return x
  parts = split(names, x.shape, mesh.shape)
  if "batch" in names:
    dim = names.index("batch")
    if 2 * x.shape[dim] >= batch_parts(mesh.shape):
      parts[dim] = tuple(axis for axis in RULES["batch"] if mesh.shape.get(axis, 1) > 1)
  if not any(parts):
    return x
  free = [name in RULES and not axes for name, axes in zip(names, parts)]
  spec = P(*(P.UNCONSTRAINED if f else axes or None for f, axes in zip(free, parts)))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gather(x: jax.Array, *names: str | None) -> jax.Array:
  """As constrain, but all other dimensions are replicated, so that an array that is read often is gathered once."""
  mesh = _mesh(x)
  if mesh is None:
    return x
  spec = P(*(axes or None for axes in split(names, x.shape, mesh.shape)))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _mesh(x: jax.Array) -> Mesh | AbstractMesh | None:
  """Returns the mesh of x; None outside of jit, or if shardings are not chosen by the compiler."""
  mesh = jax.typeof(x).sharding.mesh
  if not isinstance(x, jax.core.Tracer) or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return None
  return mesh if mesh.size > 1 else None
