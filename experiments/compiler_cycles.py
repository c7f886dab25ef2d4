"""How far are the TPU compiler's estimates of kernels from its own simulation of their instructions?

python -m experiments.compiler_cycles --topologies=v5e:2x2,v6e:2x2

Compiles products, norms and copies of the size that a bucket of d18-d28's training has, and XLA's attention, and prints
the cycles of their kernels by both measures, and the least that HBM's bandwidth allows. Each program is compiled in a
process of its own, as libtpu ends the process at a kernel that it cannot simulate.
"""

import json
from pathlib import Path
import subprocess
import sys
import tempfile

from absl import flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp

from flextok_jax import cli
from flextok_jax.core import accelerators
from flextok_jax.ops import attention, norms
from flextok_jax.tools.compile import hlo, kernels

ROWS, WIDTH, HEADS, LENGTH = 1_536, 1_792, 28, 384  # ROWS: positions of 4 samples


def _attend(q, k, v):
  return attention.attend(q, k, v, scale=0.125, implementation="xla")


def _attend_gradient(q, k, v, grad):
  return jax.vjp(_attend, q, k, v)[1](grad)


_STREAM, _HEADS = (ROWS, WIDTH), (4, LENGTH, HEADS, 64)
PROGRAMS = {
  "product [1536, 1792] x [1792, 4736]": (jnp.matmul, _STREAM, (WIDTH, 4_736)),
  "product [1536, 1792] x [1792, 1792]": (jnp.matmul, _STREAM, (WIDTH, WIDTH)),
  "SiLU of [1536, 1792]": (jax.nn.silu, _STREAM),
  "LayerNorm of [1536, 1792]": (norms.layer_norm, _STREAM),
  "transpose of [1536, 1792]": (lambda x: x.T + 0, _STREAM),
  "attention, 4 samples of 28 heads": (_attend, _HEADS, _HEADS, _HEADS),
  "its gradient": (_attend_gradient, _HEADS, _HEADS, _HEADS, _HEADS),
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_list("topologies", ["v5e:2x2"], "TPUs to compile for.", flag_values=values)
  flags.DEFINE_string("program", None, "One of the programs, for the process that compiles it.", flag_values=values)
  flags.DEFINE_string("folder", None, "Where libtpu writes its simulation, for that process.", flag_values=values)


def measure(topology: str, name: str, folder: str) -> tuple[int, int, int]:
  """Returns the cycles of a program's kernels as estimated, as simulated, and of reading and writing its arrays."""
  device = topologies.get_topology_desc(topology, "tpu").devices[0]
  run, *shapes = PROGRAMS[name]
  sharding = jax.sharding.SingleDeviceSharding(device)
  args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
  compiled = jax.jit(run).lower(*args).compile()
  estimated = {run.instruction.name: hlo.kernel_cycles(run) for run in hlo.Module(compiled.as_text()).runs()}
  estimated = {name: cycles for name, cycles in estimated.items() if cycles}
  simulated = {path.name.split("_TPU")[0]: kernels.read_cycles(path) for path in Path(folder).iterdir()}
  both = estimated.keys() & simulated.keys()
  chip, memory = accelerators.known(device), compiled.memory_analysis()
  least = (memory.argument_size_in_bytes + memory.output_size_in_bytes) / chip.bandwidth * chip.clock
  return sum(estimated[n] for n in both), sum(simulated[n] for n in both), int(least)


def main(values: flags.FlagValues):
  """Prints a table."""
  if values.program:
    print(json.dumps(measure(values.topologies[0], values.program, values.folder)))
    return
  print("| TPU | kernels | estimated | simulated | HBM alone |\n| --- | --- | ---: | ---: | ---: |")
  for topology in values.topologies:
    for name in PROGRAMS:
      with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.compiler_cycles", f"--topologies={topology}", f"--program={name}"]
        env = kernels.environment(folder) | {"JAX_PLATFORMS": "cpu"}
        process = subprocess.run([*command, f"--folder={folder}"], env=env, capture_output=True, text=True)
      cells = ["not simulated"] * 3
      if not process.returncode:
        cells = [f"{cycles / 1e3:,.1f}" for cycles in json.loads(process.stdout.splitlines()[-1])]
      print(f"| {topology} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
