"""Reads a compiled program's text (HLO): what runs how often, and what it computes, moves and sends.

XLA's own cost analysis counts the body of a loop once. Here loops over blocks, sampler steps and tokens are multiplied
out: by the trip count that XLA notes (CPU), or by start, step and bound of the loop's counter (TPU).
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import re

_ITEM_BITS = {"pred": 8, "token": 0, "bf16": 16}  # of other types the name says it: f32, s8, ...
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"(?:called_computations|branch_computations)=\{([^}]*)\}")
_UNARY = ("copy", "convert", "bitcast", "copy-start", "copy-done", "optimization-barrier")  # keep a counter's value


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a program; space 0 is the device's main memory, others lie on the chip."""

  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without the padding of tiles."""
    bits = _ITEM_BITS.get(self.dtype)
    if bits is None:
      bits = int(re.search(r"\d+", self.dtype)[0])
    return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  type: str
  arguments: str  # what stands in the parentheses
  attributes: str  # and after them

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """What it gives, tuples flattened."""
    return _arrays(self.type)

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    names = list(_CALLED.findall(self.attributes))
    for group in _CALLED_LISTS.findall(self.attributes):
      names += [name.strip().lstrip("%") for name in group.split(",")]
    return tuple(names)

  def attribute(self, name: str) -> str | None:
    """Returns the value of name=value, as far as the next comma; of name={...} what stands inside."""
    found = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|([^,\s]+))", self.attributes)
    return None if found is None else found[1] if found[1] is not None else found[2]


class Computation(dict):
  """Instructions by name, in their order; `root` is what it returns."""

  root: Instruction

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(x.arguments): x for x in self.values() if x.opcode == "parameter"}

  def operands(self, instruction: Instruction) -> list[Instruction]:
    return [self[name] for name in instruction.operands if name in self]

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    users = {}
    for instruction in self.values():
      for name in dict.fromkeys(instruction.operands):
        users.setdefault(name, []).append(instruction)
    return users


@dataclasses.dataclass(frozen=True)
class Run:
  """An instruction where it runs."""

  instruction: Instruction
  computation: Computation
  times: int
  home: str  # the computation whose schedule it is a part of
  scheduled: bool  # False: a part of a kernel in that schedule


@dataclasses.dataclass(frozen=True)
class _Frame:
  """A computation as it is called: its parameters stand for operands of `call` in `caller`."""

  computation: Computation
  call: Instruction | None = None
  caller: "_Frame | None" = None


class Program:
  """A compiled program.

  Args:
    text: as of jax's compiled.as_text() or of XLA's dump after all optimisations.
    unknown_trips: how often the body of a loop runs whose count does not stand in the program, as it ends when data
      say so (the generator's loop over tokens).

  Raises:
    ValueError: no HLO module with an entry.
  """

  def __init__(self, text: str, unknown_trips: int = 1):
    self.computations, self._entry = _parse(text)
    self.unknown_trips, self.unknown_loops = unknown_trips, 0
    self._trips = {}

  def runs(self) -> Iterator[Run]:
    """Yields all instructions with how often they run, those inside of fused kernels too.

    Of a conditional every branch counts as if it ran.
    """
    return self._walk(_Frame(self.computations[self._entry]), 1, self._entry)

  def _walk(self, frame: _Frame, times: int, home: str, scheduled: bool = True) -> Iterator[Run]:
    for x in frame.computation.values():
      yield Run(x, frame.computation, times, home, scheduled)
      if x.opcode == "while":
        inner = times * self.trips(x, frame)
      elif x.opcode in ("call", "conditional", "async-start", "fusion", "custom-call"):
        inner = times
      else:
        continue  # what a reduction or a sort calls is as good as nothing
      kernel = x.opcode in ("fusion", "custom-call")
      for name in x.called:
        deeper = (home, False) if kernel or not scheduled else (name, True)
        yield from self._walk(self._enter(x, frame, name), inner, *deeper)

  def _enter(self, call: Instruction, frame: _Frame, name: str) -> _Frame:
    return _Frame(self.computations[name], call, frame)

  def trips(self, loop: Instruction, frame: _Frame) -> int:
    """Returns how often the body of a while loop runs: unknown_trips where the program does not say it."""
    if loop.name not in self._trips:
      known = re.search(r'known_trip_count"?[=:]\s*\{"?n"?:"?(\d+)', loop.attributes)
      trips = int(known[1]) if known else self._counted(loop, frame)
      self.unknown_loops += trips is None
      self._trips[loop.name] = self.unknown_trips if trips is None else trips
    return self._trips[loop.name]

  def _counted(self, loop: Instruction, frame: _Frame) -> int | None:
    """The trips of `for (i = start; i < bound; i += step)`, None where the loop is no such."""
    condition, body = (self._enter(loop, frame, loop.attribute(name).lstrip("%")) for name in ("condition", "body"))
    test, at = self._resolve(condition, condition.computation.root)
    if test.opcode != "compare":
      return None
    sides = [self._resolve(at, x) for x in at.computation.operands(test)]
    direction = test.attribute("direction")
    if self._carried(*sides[0]) is None:
      sides.reverse()
      direction = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction)
    index, bound = self._carried(*sides[0]), self._constant(*sides[1])
    if index is None or bound is None or direction not in ("LT", "LE", "GT", "GE"):
      return None
    start = self._constant(*self._element(frame, loop, index))
    step, at = self._element(body, body.computation.root, index)
    if start is None or step.opcode not in ("add", "subtract"):
      return None
    terms = [self._resolve(at, x) for x in at.computation.operands(step)]
    counter = [self._carried(*term) == index for term in terms]
    by = [self._constant(*term) for term in terms]
    if counter not in ([True, False], [False, True]) or (step.opcode == "subtract" and counter[1]):
      return None
    by = by[counter.index(False)]
    if not by:
      return None
    by = -by if step.opcode == "subtract" else by
    span = bound - start + (1 if direction == "LE" else -1 if direction == "GE" else 0)
    return max(0, math.ceil(span / by)) if (by > 0) == (direction in ("LT", "LE")) else None

  def _resolve(self, frame: _Frame, x: Instruction) -> tuple[Instruction, _Frame]:
    """Follows copies, fusions and parameters to the instruction that makes a value, and where that stands."""
    computation = frame.computation
    if x.opcode in _UNARY:
      return self._resolve(frame, computation.operands(x)[0])
    if x.opcode == "fusion":
      inner = self._enter(x, frame, x.called[0])
      return self._resolve(inner, inner.computation.root)
    if x.opcode == "parameter" and frame.call is not None and frame.call.opcode in ("fusion", "call"):
      return self._resolve(frame.caller, frame.caller.computation.operands(frame.call)[int(x.arguments)])
    if x.opcode == "get-tuple-element":
      index, source = int(x.attribute("index")), computation.operands(x)[0]
      if source.opcode == "parameter" and frame.call is not None and frame.call.opcode == "while":
        body = self.computations[frame.call.attribute("body").lstrip("%")]
        if _unchanged(body, index):  # what the loop leaves as it is has the value from before
          return self._element(frame.caller, frame.call, index)
      elif source.opcode in ("tuple", "fusion"):
        return self._element(frame, source, index)
    return x, frame

  def _element(self, frame: _Frame, x: Instruction, index: int) -> tuple[Instruction, _Frame]:
    """Resolves an element of a tuple: of one that is made, of a fusion's, or of what a loop starts from."""
    if x.opcode == "while":
      return self._element(frame, frame.computation.operands(x)[0], index)
    if x.opcode == "fusion":
      inner = self._enter(x, frame, x.called[0])
      return self._element(inner, inner.computation.root, index)
    if x.opcode == "tuple":
      return self._resolve(frame, frame.computation.operands(x)[index])
    return x, frame

  def _carried(self, x: Instruction, frame: _Frame) -> int | None:
    """The place in the loop's state that x reads, None if it is no such."""
    if x.opcode != "get-tuple-element" or frame.computation.operands(x)[0].opcode != "parameter":
      return None
    return int(x.attribute("index"))

  def _constant(self, x: Instruction, frame: _Frame) -> int | None:
    return int(x.arguments) if x.opcode == "constant" and re.fullmatch(r"-?\d+", x.arguments) else None


def _unchanged(body: Computation, index: int) -> bool:
  if body.root.opcode != "tuple":
    return False
  x = body.operands(body.root)[index]
  return (
    x.opcode == "get-tuple-element"
    and int(x.attribute("index")) == index
    and (body.operands(x)[0].opcode == "parameter")
  )


def _parse(text: str) -> tuple[dict[str, Computation], str]:
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if line.startswith("  ") and current is not None and " = " in line:
      x = _instruction(line)
      current[x.name] = x
      if line.startswith("  ROOT "):
        current.root = x
    elif line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) .*->", line)):
      current = computations[head[2]] = Computation()
      entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      current = None
  if entry is None:
    raise ValueError(f"no HLO program in a text that begins with {text[:40]!r}")
  return computations, entry


def _instruction(line: str) -> Instruction:
  name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  type_, rest = rest[:end], rest[end:].lstrip()
  start = rest.index("(")
  end = _closing(rest, start)
  return Instruction(name.lstrip("%"), rest[:start], type_, rest[start + 1 : end], rest[end + 1 :])


def _closing(text: str, start: int) -> int:
  """The place of the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.start()
  raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _arrays(text: str) -> tuple[Array, ...]:
  arrays = []
  for dtype, dims, layout in _ARRAY.findall(text):
    space = re.search(r"S\((\d+)\)", layout)
    dims = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    arrays.append(Array(dtype, dims, int(space[1]) if space else 0))
  return tuple(arrays)


def matmul_flops(program: Program) -> int:
  """Returns 2 a multiply-add of all products and convolutions, padding left out; none of custom kernels."""
  return sum(
    run.times * _FLOPS[run.instruction.opcode](run) for run in program.runs() if run.instruction.opcode in _FLOPS
  )


def _dot_flops(run: Run) -> int:
  left = run.computation.operands(run.instruction)[0].arrays[0]
  contracted = run.instruction.attribute("lhs_contracting_dims") or ""
  return 2 * run.instruction.arrays[0].size * math.prod(left.dims[int(d)] for d in contracted.split(",") if d)


def _convolution_flops(run: Run) -> int:
  """Pairs of an output and an input that the kernel joins; TPUs' batched products are convolutions too."""
  x = run.instruction
  left, right = (operand.arrays[0] for operand in run.computation.operands(x)[:2])
  inputs, kernel, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes).groups()
  window = dict(re.findall(r"(\w+)=([\w\-]+)", x.attribute("window") or ""))
  pairs = 1
  for axis in range(len(inputs) - 2):
    values = lambda name, default, axis=axis: (
      [int(v) for v in window[name].split("x")[axis].split("_")] if name in window else [default, default]
    )
    size_in, size_out = left.dims[inputs.index(str(axis))], x.arrays[0].dims[outputs.index(str(axis))]
    pairs *= _pairs(
      size_in,
      right.dims[kernel.index(str(axis))],
      size_out,
      values("stride", 1)[0],
      values("pad", 0)[0],
      values("lhs_dilate", 1)[0],
      values("rhs_dilate", 1)[0],
    )
  groups = int(x.attribute("batch_group_count") or 1)
  batch, features = x.arrays[0].dims[outputs.index("b")], x.arrays[0].dims[outputs.index("f")]
  return 2 * batch * features * right.dims[kernel.index("i")] * pairs // groups


@functools.lru_cache(maxsize=4096)
def _pairs(size_in: int, taps: int, size_out: int, stride: int, low: int, dilate_in: int, dilate_taps: int) -> int:
  """Along an axis, (output, tap) that meet an input and not its padding or the holes of its dilation."""
  last, count = (size_in - 1) * dilate_in, 0
  for tap in range(taps):
    places = (o * stride + tap * dilate_taps - low for o in range(size_out))
    count += sum(0 <= place <= last and place % dilate_in == 0 for place in places)
  return count


_FLOPS: dict[str, Callable[[Run], int]] = {"dot": _dot_flops, "convolution": _convolution_flops}


def cycles(program: Program) -> int:
  """Returns the cycles that a TPU's compiler reckons with for all kernels, one after another; 0 on other devices."""
  total = 0
  for run in program.runs():
    if run.scheduled and (found := re.search(r'"estimated_cycles":"(\d+)"', run.instruction.attributes)):
      total += run.times * int(found[1])
  return total


def custom_kernels(program: Program) -> int:
  """Returns how often kernels of Pallas run, whose FLOPs and cycles the program's text does not tell."""
  target = 'custom_call_target="tpu_custom_call"'
  return sum(run.times for run in program.runs() if target in run.instruction.attributes)
