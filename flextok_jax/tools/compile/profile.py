"""Where the cycles of a compiled program go, by the TPU compiler's estimate of each kernel."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import re
from typing import Any

from flextok_jax.tools.compile import hlo
from flextok_jax.tools.compile import kernels as pallas
from flextok_jax.tools.compile.hlo import Computation, Instruction, Module
from flextok_jax.tools.compile.traffic import KINDS as COLLECTIVES

# Kinds of kernels, in the order in which tables list them.
PRODUCTS = "products with weights"
ATTENTION = "attention: products of queries, keys and values"
SOFTMAX = "attention: softmax and weights of keys"
HEAD_NORMS = "norms of queries and keys"
BLOCKS = "norms, modulation, activations and residuals"
OPTIMIZER = "optimizer and average"
MOVES = "copies and layout changes"
WAITS = "collectives"
REST = "the rest: noise, embeddings, FSQ, loss, sampling"
KINDS = (PRODUCTS, ATTENTION, SOFTMAX, HEAD_NORMS, BLOCKS, OPTIMIZER, MOVES, WAITS, REST)

_MOVING = {"copy", "transpose", "reshape", "bitcast", "slice", "concatenate", "pad", "broadcast", "dynamic-slice"}
_MOVING |= {"dynamic-update-slice", "copy-start", "copy-done", "slice-start", "slice-done", "parameter", "constant"}
_MOVING |= {"tuple", "get-tuple-element", "convert", "iota", "fusion"}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """All runs of the kernels of one kind from one line of the model.

  Attributes:
    kind: of KINDS.
    source: path of modules and primitive in the traced program, as JAX names it.
    runs: how often they run in a call.
    cycles: of all runs.
    flops: of the products in all runs.
  """

  kind: str
  source: str
  runs: int
  cycles: int
  flops: int


def kernels(module: Module, simulated: Mapping[pallas.Kernel, int] | None = None) -> list[Kernel]:
  """Returns the kernels of a program on a TPU, those with the most cycles first; [] for other devices.

  Args:
    module: the program.
    simulated: cycles of its kernels of Pallas, as of kernels.cycles.
  """
  runs: Counter[tuple[str, str]] = Counter()
  cycles: Counter[tuple[str, str]] = Counter()
  flops: Counter[tuple[str, str]] = Counter()
  for run in module.runs():
    kernel = pallas.find(run)
    found = hlo.kernel_cycles(run) if kernel is None else (simulated or {}).get(kernel)
    if not found:
      continue
    inside = list(_inside(module, run.instruction, run.computation))
    kind = ATTENTION if kernel else _kind(run.instruction, [x for x, _ in inside])
    key = kind, _source(run.instruction)
    runs[key] += run.times
    cycles[key] += run.times * found
    products = kernel.flops if kernel else sum(hlo.product_flops(x, computation) for x, computation in inside)
    flops[key] += run.times * products
  return [Kernel(*key, runs[key], cycles[key], flops[key]) for key, _ in cycles.most_common()]


def _inside(module: Module, x: Instruction, computation: Computation) -> Iterator[tuple[Instruction, Computation]]:
  """Yields an instruction and those fused into it."""
  yield x, computation
  if x.opcode in ("fusion", "custom-call"):
    for name in x.called:
      for inner in module.computations[name].values():
        yield from _inside(module, inner, module.computations[name])


def _source(x: Instruction) -> str:
  found = re.search(r'op_name="([^";]*)', x.attributes)
  return found[1] if found else x.opcode


def _kind(x: Instruction, inside: list[Instruction]) -> str:
  source = _source(x)
  opcodes = {y.opcode for y in inside}
  attends = "attention._attend" in source and "/out/" not in source
  if opcodes & {"dot", "convolution"}:  # which may be fused with a collective that runs meanwhile
    return ATTENTION if attends else PRODUCTS
  if any(name in opcode for opcode in opcodes for name in COLLECTIVES):
    return WAITS
  if opcodes <= _MOVING:
    return MOVES
  if "/head_norms/" in source or "_norm_q" in source or "_norm_k" in source:
    return HEAD_NORMS
  if attends:
    return SOFTMAX
  if "/transformer/" in source or "/blocks/" in source:
    return BLOCKS
  return OPTIMIZER if source.startswith("jit(update)") and "jvp(" not in source else REST


def by_kind(found: Iterable[Kernel]) -> list[dict[str, Any]]:
  """Returns {kind, runs, cycles, flops} of each kind that a program has, in the order of KINDS."""
  rows = {kind: {"kind": kind, "runs": 0, "cycles": 0, "flops": 0} for kind in KINDS}
  for kernel in found:
    for name in ("runs", "cycles", "flops"):
      rows[kernel.kind][name] += getattr(kernel, name)
  return [row for row in rows.values() if row["runs"]]
