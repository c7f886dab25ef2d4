"""Cycles of the attention kernels of Pallas on TPUs, which compiled programs do not state.

python -m flextok_jax.tools.compile.kernels TOPOLOGY '[["attention", "bf16", [16, 28, 64, 384], 384, false, true]]' DIR

prints a JSON list of cycles. libtpu simulates the instructions of what it compiles, and writes the result to DIR, if a
variable of the environment asks for it before it is loaded, so a process of its own does this. Samples follow each
other, so two of them are simulated, and the time of the others is that of the second. libtpu fails to simulate
gradients of lengths that are no multiple of 128, the width of a tile: they count as those of the next multiple, which
takes longer.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from flextok_jax.core import files
from flextok_jax.ops import attention_pallas
from flextok_jax.tools.compile import hlo

_TILE = 128  # positions
_DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
_PRODUCTS = {attention_pallas.FORWARD: 2, attention_pallas.BACKWARD: 5}  # of a query with a key, in all features
_OPERANDS = {attention_pallas.FORWARD: 4, attention_pallas.BACKWARD: 5}  # without a mask


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An attention kernel in a compiled program.

  Attributes:
    name: attention_pallas.FORWARD or BACKWARD.
    dtype: of queries, keys and values, "bf16" or "f32".
    queries: [b, h, e, lq].
    keys: their number.
    masked: whether there is a mask.
    layer_norm: whether it normalises queries and keys.
  """

  name: str
  dtype: str
  queries: tuple[int, ...]
  keys: int
  masked: bool
  layer_norm: bool

  @property
  def flops(self) -> int:
    """Of its products."""
    batch, heads, head_dim, queries = self.queries
    return 2 * _PRODUCTS[self.name] * batch * heads * head_dim * queries * self.keys


def find(run: hlo.Run) -> Kernel | None:
  """Returns the attention kernel that an instruction is; None for other instructions."""
  x = run.instruction
  if 'custom_call_target="tpu_custom_call"' not in x.attributes:
    return None
  names = f"({attention_pallas.NORMALISED})?({attention_pallas.FORWARD}|{attention_pallas.BACKWARD})"
  found = re.search(rf'op_name="[^"]*/{names}/pallas_call', x.attributes)
  if not found:
    return None
  queries, keys, *others = (operand.arrays[0] for operand in run.computation.operands(x))
  masked = len(others) + 2 > _OPERANDS[found[2]]
  return Kernel(found[2], queries.dtype, queries.dims, keys.dims[-1], masked, bool(found[1]))


def environment(folder: str) -> dict[str, str]:
  """Returns the environment of a process in which libtpu simulates what it compiles; it writes results to folder."""
  flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_static_llo_profile_to={folder}"
  return os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_COMPILATION_CACHE_DIR": ""}


def read_cycles(path: Path) -> int:
  """Returns the cycles in a file that libtpu wrote of a kernel that it simulated."""
  return int(re.findall(r"estimated_cycles: (\d+)", files.read_text(path))[0])


def cycles(found: list[Kernel], topology: str) -> dict[Kernel, int]:
  """Returns the cycles that the compiler expects for one run of each kernel on a device of the topology.

  Raises:
    RuntimeError: the compiler failed, or wrote no estimate.
  """
  if not found:
    return {}
  with tempfile.TemporaryDirectory() as folder:
    arguments = topology, json.dumps([dataclasses.astuple(k) for k in found]), folder
    process = subprocess.run(
      [sys.executable, "-m", "flextok_jax.tools.compile.kernels", *arguments],
      env=environment(folder),
      capture_output=True,
      text=True,
    )
  if process.returncode:
    raise RuntimeError(f"the compiler did not simulate the attention kernels: {process.stderr[-500:]}")
  return dict(zip(found, json.loads(process.stdout.splitlines()[-1]), strict=True))


def _simulate(kernel: Kernel, samples: int, device: jax.Device, folder: Path) -> int:
  """Returns the cycles of a kernel for this number of samples."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
  _, heads, head_dim, queries = kernel.queries
  keys, dtype = kernel.keys, _DTYPES[kernel.dtype]
  if kernel.name == attention_pallas.BACKWARD:
    queries, keys = (-(-length // _TILE) * _TILE for length in (queries, keys))
  q = shape((samples, heads, head_dim, queries), dtype)
  k = shape((samples, heads, head_dim, keys), dtype)
  bias = shape((samples, keys, 1), jnp.float32)
  mask = shape((keys, queries), jnp.bfloat16) if kernel.masked else None
  grad = [q] if kernel.name == attention_pallas.BACKWARD else []
  run = functools.partial(attention_pallas.run_kernel, kernel.name, 1.0, kernel.layer_norm)
  for old in folder.iterdir():
    old.unlink()
  jax.jit(run).lower(q, k, k, bias, mask, *grad).compile()
  (path,) = folder.glob(f"*{kernel.name}.*")
  return read_cycles(path)


def main(topology: str, found: str, folder: str) -> None:
  """Prints the cycles of kernels; see above."""
  device = topologies.get_topology_desc(topology, "tpu").devices[0]
  results = []
  for name, dtype, queries, *rest in json.loads(found):
    kernel = Kernel(name, dtype, tuple(queries), *rest)
    one, two = (_simulate(kernel, samples, device, Path(folder)) for samples in (1, 2))
    results.append(one + (queries[0] - 1) * (two - one))
  print(json.dumps(results))


if __name__ == "__main__":
  main(*sys.argv[1:])
