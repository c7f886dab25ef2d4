"""Traffic of a compiled program: bytes sent between devices, and bytes read and written in their main memory."""

import dataclasses
import re

import numpy as np

from flextok_jax.tools.compile.hlo import Array, Computation, Instruction, Module, Run

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")

# Instructions that only name arrays, or whose traffic is counted elsewhere.
_FREE = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
  "optimization-barrier",
  "add-dependency",
  "async-start",
  "async-update",
  "async-done",
  "domain",
)
_SLICES = ("dynamic-slice", "slice", "gather")
_ASYNC = 'custom_call_target="AsyncCollective'  # in TPU kernels that start, continue or end a collective


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of a module."""

  kind: str
  times: int
  sent: int  # bytes per device each time
  group: tuple[int, ...]  # indices in the mesh of the devices of the first group


def collectives(module: Module, devices: int) -> list[Collective]:
  """Returns the collectives of a program for this number of devices.

  Bytes are those of the ring algorithms, n devices in a group and S bytes of operands on each: all-reduce
  2 (n - 1) / n S, all-gather (n - 1) S, reduce-scatter and all-to-all (n - 1) / n S, permute and broadcast S. Groups
  of a single device are left out.
  """
  found, seen = [], set()
  runs = [run for run in module.runs() if run.instruction.opcode.removesuffix("-start") in KINDS]
  # A collective that overlaps other work is part of several kernels, possibly in a loop's body, with the same channel
  # id. It runs as often as the kernel that starts it.
  starts = {run.instruction.attribute("channel_id") for run in runs if _starts(run)} - {None}
  for run in runs:
    x = run.instruction
    kind = x.opcode.removesuffix("-start")
    channel = x.attribute("channel_id")
    if channel in starts and not _starts(run):
      continue
    if not run.scheduled:
      key = run.home, channel or x.name
      if key in seen:
        continue
      seen.add(key)
      users = run.computation.users.get(x.name, [])
      if kind == "all-reduce" and users and all(user.opcode == "dynamic-slice" for user in users):
        kind = "reduce-scatter"  # its form on TPUs
    group = first_group(x.attributes, devices)
    size = sum(array.bytes for operand in run.computation.operands(x) for array in operand.arrays)
    if len(group) > 1:
      found.append(Collective(kind, run.times, _sent(kind, size, len(group)), group))
  return found


def _starts(run: Run) -> bool:
  return not run.scheduled and any(f'{_ASYNC}Start"' in x.attributes for x in run.computation.values())


def _sent(kind: str, size: int, n: int) -> int:
  share = (n - 1) / n
  shares = {"all-reduce": 2 * share, "all-gather": n - 1, "reduce-scatter": share, "all-to-all": share}
  return round(shares.get(kind, 1) * size)


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
  """Returns the first group of a collective's devices; for a permutation, the first sender and receiver.

  Raises:
    ValueError: the groups have an unknown notation.
  """
  if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
    return tuple(map(int, found.groups()))
  found = re.search(r"replica_groups=(.*)", attributes)
  text = found[1] if found else "{}"
  if text.startswith("{}"):
    return tuple(range(devices))
  if found := re.match(r"\{\{([\d,]+)\}", text):
    return _numbers(found[1])
  if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    return tuple(_iota(*found.groups()[1:]).reshape(_numbers(found[1]))[0].tolist())
  if found := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    ids = _iota(found[2], found[3]) if found[2] else np.arange(np.prod(list(sizes.values())))
    ids = ids.reshape(tuple(sizes.values()))
    index: list[int | slice] = [0] * len(sizes)
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[4]):
      whole = sizes[name]  # or a part of the axis: `size` devices, with a stride
      step = whole // (int(before) * int(size)) if size else 1
      index[list(sizes).index(name)] = slice(0, (int(size) if size else whole) * step, step)
    return tuple(int(i) for i in np.ravel(ids[tuple(index)]))
  raise ValueError(f"unknown groups of a collective: {text[:80]}")


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(","))


def _iota(dims: str, order: str | None) -> np.ndarray:
  ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order)) if order else ids


def memory_bytes(module: Module) -> int:
  """Returns the bytes that a program reads and writes in the device's main memory.

  A kernel reads its operands and writes its outputs once, without the padding of tiles; of arrays that it slices or
  updates in place, only the slices. Arrays that the compiler keeps on the chip are not counted.
  """
  traffic = _Traffic(module)
  return sum(run.times * traffic.bytes(run) for run in module.runs() if run.scheduled)


class _Traffic:
  """Bytes of the instructions of a schedule."""

  def __init__(self, module: Module):
    self._computations = module.computations
    self._known: dict[tuple[str, str], int] = {}

  def bytes(self, run: Run) -> int:
    key = run.home, run.instruction.name
    if key not in self._known:
      self._known[key] = self._bytes(run.instruction, run.computation)
    return self._known[key]

  def _bytes(self, x: Instruction, computation: Computation) -> int:
    operands = [operand.arrays for operand in computation.operands(x)]
    if x.opcode in _FREE or x.opcode.endswith("-done") or 'custom_call_target="AllocateBuffer"' in x.attributes:
      return 0
    if x.opcode == "fusion":
      return self._kernel(self._computations[x.called[0]], x.arrays, operands)
    if x.opcode in _SLICES:
      return _main(x.arrays) + (_size(x.arrays) if _main(operands[0]) else 0)
    if x.opcode == "dynamic-update-slice":
      return _main(operands[1]) + (_size(operands[1]) if _main(x.arrays) else 0)
    if x.opcode == "copy-start":  # (result, operand, flag)
      return _main(x.arrays[:2])
    return _main(x.arrays) + sum(map(_main, operands))

  def _kernel(self, inner: Computation, outputs: tuple[Array, ...], operands: list[tuple[Array, ...]]) -> int:
    if any(_ASYNC + "Start" in x.attributes for x in inner.values()):
      return _main(outputs)  # the forwarded operand and the result; other kernels continue with these
    total = 0
    for place, arrays in enumerate(operands):
      if _main(arrays):
        total += self._read(inner, inner.parameters[place], arrays[0].size) * arrays[0].bytes // arrays[0].size
    roots = inner.operands(inner.root) if inner.root.opcode == "tuple" else [inner.root]
    for root, array in zip(roots, outputs):
      if _main((array,)):
        total += self._written(inner, root, array.size) * array.bytes // array.size
    return total

  def _read(self, computation: Computation, x: Instruction, whole: int) -> int:
    """Returns the number of elements of x, at most `whole`, that a kernel reads."""
    total = 0
    for user in computation.users.get(x.name, ()):
      first = user.operands[0] == x.name
      if first and user.opcode in _SLICES:
        total += user.arrays[0].size
      elif (
        (first and user.opcode == "dynamic-update-slice") or user.opcode == "tuple" or (self._async(computation, user))
      ):
        continue  # updated in place, or forwarded
      elif self._passes(user):
        total += self._read(computation, user, whole)
      elif user.opcode == "fusion":
        inner = self._computations[user.called[0]]
        total += self._read(inner, inner.parameters[user.operands.index(x.name)], whole)
      else:
        return whole
    return min(total, whole)

  def _written(self, computation: Computation, x: Instruction, whole: int) -> int:
    """Returns the number of elements that a kernel writes to produce x."""
    while self._passes(x):
      x = computation.operands(x)[0]
    if x.opcode == "dynamic-update-slice":
      return computation.operands(x)[1].arrays[0].size
    return 0 if x.opcode in ("parameter", "get-tuple-element") or self._async(computation, x) else whole

  def _passes(self, x: Instruction) -> bool:
    """Returns whether x is its operand in another layout or type."""
    if x.opcode != "fusion":
      return x.opcode in ("bitcast", "copy", "convert", "reshape")
    inner = self._computations[x.called[0]]
    return len(x.operands) == 1 and all(y.opcode == "parameter" or self._passes(y) for y in inner.values())

  def _async(self, computation: Computation, x: Instruction) -> bool:
    """Returns whether x is a collective that other kernels start or end and this one only forwards."""
    users = computation.users.get(x.name, ())
    handed_on = bool(users) and all(user.opcode == "tuple" or _ASYNC in user.attributes for user in users)
    return _ASYNC in x.attributes or (x.opcode in KINDS and handed_on)


def _size(arrays: tuple[Array, ...]) -> int:
  return sum(array.bytes for array in arrays)


def _main(arrays: tuple[Array, ...]) -> int:
  """Returns the bytes of arrays in main memory."""
  return sum(array.bytes for array in arrays if not array.space)
