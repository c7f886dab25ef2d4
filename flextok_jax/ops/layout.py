"""Logical axes: names of the dimensions of arrays, and over which axes of the device mesh each of them is split."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Logical axis: mesh axes. Every other one ("layers", "head_dim", "conv_out", None, ...) is whole on every device. Rows
# of the batch lie on "data" and "fsdp", what is large of the parameters on "fsdp" (sharding.py says how large), and
# "tensor" has parts of what a block computes: heads, hidden units, words of the vocabulary.
RULES = {
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

  A mesh axis is passed over where the dimension does not divide by it, and where an earlier dimension has it already.

  Args:
    names: logical axes.
    shape: of the array.
    sizes: of the mesh axes; those that are missing have size 1.
  """
  taken, parts = set(), []
  for name, length in zip(names, shape, strict=True):
    parts.append(())
    for axis in RULES.get(name, ()):
      size = sizes.get(axis, 1)
      if size > 1 and axis not in taken and length % size == 0:
        parts[-1] += (axis,)
        taken.add(axis)
        length //= size
  return parts


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Fixes how an intermediate result lies on the mesh, by the logical axes of its dimensions.

  The mesh is that of the arrays that x was computed from. Where there is none, or outside of jit, or where nothing of x
  divides, x comes back as it is. A named dimension that does not divide is left to the compiler.
  """
  mesh = _mesh(x)
  parts = split(names, x.shape, mesh.shape) if mesh else []
  if not any(parts):
    return x
  free = [name in RULES and not axes for name, axes in zip(names, parts)]
  spec = P(*(P.UNCONSTRAINED if f else axes or None for f, axes in zip(free, parts)))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gather(x: jax.Array, *names: str | None) -> jax.Array:
  """As constrain, but dimensions that no name divides are whole on every device: what is read often is fetched once."""
  mesh = _mesh(x)
  if not mesh:
    return x
  spec = P(*(axes or None for axes in split(names, x.shape, mesh.shape)))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _mesh(x: jax.Array) -> Mesh | AbstractMesh | None:
  """Returns the mesh that x lies on, None outside of jit and where the compiler does not choose places."""
  mesh = jax.typeof(x).sharding.mesh
  if not isinstance(x, jax.core.Tracer) or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return None
  return mesh if mesh.size > 1 else None
