"""Parses compiled HLO: instructions, how often each runs, FLOPs and cycles.

XLA's own cost analysis counts the body of a loop once. Here loops over blocks, sampler steps and tokens are multiplied
out: by the trip count that XLA annotates (CPU), or by start, step and bound of the loop's counter (TPU).
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import re

from flextok_jax.core.flops import joined_pairs

_ITEM_BITS = {"pred": 8, "token": 0, "bf16": 16}  # other types have it in their name: f32, s8, ...
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"(?:called_computations|branch_computations)=\{([^}]*)\}")
_UNARY = (
  "copy",
  "convert",
  "bitcast",
  "copy-start",
  "copy-done",
  "optimization-barrier",
)  # do not change a counter's value


@dataclasses.dataclass(frozen=True)
class Array:
  """An array; memory space 0 is the device's main memory, others are on the chip."""

  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Size without the padding of tiles."""
    bits = _ITEM_BITS.get(self.dtype)
    if bits is None:
      bits = int(re.sub(r"^\D*(\d+).*", r"\1", self.dtype))
    return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  type: str
  arguments: str  # text in the parentheses
  attributes: str  # text after them

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """Outputs, with tuples flattened."""
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
    """Returns the value of name=value up to the next comma, or the contents of name={...}; None if there is none."""
    found = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|([^,\s]+))", self.attributes)
    return None if found is None else found[1] if found[1] is not None else found[2]

  def index(self) -> int:
    """Returns the attribute "index" of a get-tuple-element."""
    return int(self.attribute("index") or 0)


class Computation(dict[str, Instruction]):
  """Instructions by name, in order; `root` is the output."""

  root: Instruction

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(x.arguments): x for x in self.values() if x.opcode == "parameter"}

  def operands(self, instruction: Instruction) -> list[Instruction]:
    return [self[name] for name in instruction.operands if name in self]

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for instruction in self.values():
      for name in dict.fromkeys(instruction.operands):
        users.setdefault(name, []).append(instruction)
    return users


@dataclasses.dataclass(frozen=True)
class Run:
  """An instruction in its context, with the number of times that it runs."""

  instruction: Instruction
  computation: Computation
  times: int
  home: str  # name of the computation whose schedule it belongs to
  scheduled: bool  # False: inside a kernel of that schedule


@dataclasses.dataclass(frozen=True)
class _Frame:
  """A computation with its call: its parameters are the operands of `call` in `caller`."""

  computation: Computation
  call: Instruction | None = None
  caller: "_Frame | None" = None


class Module:
  """A compiled HLO module.

  Args:
    text: of compiled.as_text() or of XLA's dump after all optimisations.
    unknown_trips: trip count assumed for data-dependent loops (the generator's loop over tokens).

  Raises:
    ValueError: the text has no HLO module with an entry.
  """

  def __init__(self, text: str, unknown_trips: int = 1):
    self.computations, self._entry = _parse(text)
    self.unknown_trips, self.unknown_loops = unknown_trips, 0
    self._trips: dict[str, int] = {}

  def runs(self) -> Iterator[Run]:
    """Yields all instructions, including those in fused kernels, with the number of times that they run.

    Every branch of a conditional is counted as if it ran.
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
        continue  # the computations of reductions and sorts are negligible
      kernel = x.opcode in ("fusion", "custom-call")
      for name in x.called:
        deeper = (home, False) if kernel or not scheduled else (name, True)
        yield from self._walk(self._enter(x, frame, name), inner, *deeper)

  def _enter(self, call: Instruction, frame: _Frame, name: str) -> _Frame:
    return _Frame(self.computations[name], call, frame)

  def trips(self, loop: Instruction, frame: _Frame) -> int:
    """Returns how often the body of a while loop runs; unknown_trips if the count is not in the program."""
    if loop.name not in self._trips:
      known = re.search(r'known_trip_count"?[=:]\s*\{"?n"?:"?(\d+)', loop.attributes)
      trips = int(known[1]) if known else self._counted(loop, frame)
      self.unknown_loops += trips is None
      self._trips[loop.name] = self.unknown_trips if trips is None else trips
    return self._trips[loop.name]

  def _counted(self, loop: Instruction, frame: _Frame) -> int | None:
    """Returns the trip count of `for (i = start; i < bound; i += step)`, None for other loops."""
    condition, body = (self._enter(loop, frame, _computation(loop, name)) for name in ("condition", "body"))
    test, at = self._resolve(condition, condition.computation.root)
    if test.opcode != "compare":
      return None
    sides = [self._resolve(at, x) for x in at.computation.operands(test)]
    direction = test.attribute("direction")
    if self._carried(*sides[0]) is None:
      sides.reverse()
      direction = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction or "")
    index, bound = self._carried(*sides[0]), self._constant(*sides[1])
    if index is None or bound is None or direction not in ("LT", "LE", "GT", "GE"):
      return None
    start = self._constant(*self._element(frame, loop, index))
    step, at = self._element(body, body.computation.root, index)
    if start is None or step.opcode not in ("add", "subtract"):
      return None
    terms = [self._resolve(at, x) for x in at.computation.operands(step)]
    counter = [self._carried(*term) == index for term in terms]
    if counter not in ([True, False], [False, True]) or (step.opcode == "subtract" and counter[1]):
      return None
    by = self._constant(*terms[counter.index(False)])
    if not by:
      return None
    by = -by if step.opcode == "subtract" else by
    span = bound - start + (1 if direction == "LE" else -1 if direction == "GE" else 0)
    return max(0, math.ceil(span / by)) if (by > 0) == (direction in ("LT", "LE")) else None

  def _resolve(self, frame: _Frame, x: Instruction) -> tuple[Instruction, _Frame]:
    """Follows copies, fusions and parameters to the instruction that computes a value; returns it with its frame."""
    computation, call, caller = frame.computation, frame.call, frame.caller
    if x.opcode in _UNARY:
      return self._resolve(frame, computation.operands(x)[0])
    if x.opcode == "fusion":
      inner = self._enter(x, frame, x.called[0])
      return self._resolve(inner, inner.computation.root)
    if x.opcode == "parameter" and call and caller and call.opcode in ("fusion", "call"):
      return self._resolve(caller, caller.computation.operands(call)[int(x.arguments)])
    if x.opcode == "get-tuple-element":
      index, source = x.index(), computation.operands(x)[0]
      if source.opcode == "parameter" and call and caller and call.opcode == "while":
        body = self.computations[_computation(call, "body")]
        if _unchanged(body, index):  # an element that the loop does not change has its initial value
          return self._element(caller, call, index)
      elif source.opcode in ("tuple", "fusion"):
        return self._element(frame, source, index)
    return x, frame

  def _element(self, frame: _Frame, x: Instruction, index: int) -> tuple[Instruction, _Frame]:
    """Resolves an element of a tuple: of a tuple instruction, a fusion's output, or the initial state of a loop."""
    if x.opcode == "while":
      return self._element(frame, frame.computation.operands(x)[0], index)
    if x.opcode == "fusion":
      inner = self._enter(x, frame, x.called[0])
      return self._element(inner, inner.computation.root, index)
    if x.opcode == "tuple":
      return self._resolve(frame, frame.computation.operands(x)[index])
    return x, frame

  def _carried(self, x: Instruction, frame: _Frame) -> int | None:
    """Returns the index in the loop's state that x reads, None for other instructions."""
    if x.opcode != "get-tuple-element" or frame.computation.operands(x)[0].opcode != "parameter":
      return None
    return x.index()

  def _constant(self, x: Instruction, frame: _Frame) -> int | None:
    return int(x.arguments) if x.opcode == "constant" and re.fullmatch(r"-?\d+", x.arguments) else None


def _computation(call: Instruction, name: str) -> str:
  """Returns the name of the computation that an attribute of a call refers to."""
  return (call.attribute(name) or "").lstrip("%")


def _unchanged(body: Computation, index: int) -> bool:
  if body.root.opcode != "tuple":
    return False
  x = body.operands(body.root)[index]
  return x.opcode == "get-tuple-element" and x.index() == index and (body.operands(x)[0].opcode == "parameter")


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
  """Returns the position of the parenthesis that closes the one at `start`."""
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


def matmul_flops(module: Module) -> int:
  """Returns the FLOPs of products and convolutions, 2 per multiply-add, without padding and custom kernels."""
  return sum(run.times * product_flops(run.instruction, run.computation) for run in module.runs())


def product_flops(x: Instruction, computation: Computation) -> int:
  """Returns the FLOPs of one run of an instruction of the computation, if it is a product or a convolution; else 0."""
  return _FLOPS[x.opcode](x, computation) if x.opcode in _FLOPS else 0


def _dot_flops(x: Instruction, computation: Computation, contracted: str | None = None) -> int:
  """Counts a product that sums over axes of its left operand; default: those of its attribute."""
  left = computation.operands(x)[0].arrays[0]
  axes = (x.attribute("lhs_contracting_dims") or "") if contracted is None else contracted
  return 2 * x.arrays[0].size * math.prod(left.dims[int(axis)] for axis in re.findall(r"\d+", axes))


def _convolution_flops(x: Instruction, computation: Computation) -> int:
  """Counts a convolution; batched products are convolutions on TPUs."""
  left, right = (operand.arrays[0] for operand in computation.operands(x)[:2])
  return _joined_flops(x, left, right, x.arrays[0])


def _joined_flops(x: Instruction, left: Array, right: Array, out: Array) -> int:
  """Counts pairs of an output and an input that a kernel joins: those of x, a convolution or a derivative of one."""
  inputs, kernel, outputs = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)[0]
  window = dict(re.findall(r"(\w+)=([\w\-]+)", x.attribute("window") or ""))
  pairs = 1
  for axis in range(len(inputs) - 2):
    values = lambda name, default, axis=axis: (
      [int(v) for v in window[name].split("x")[axis].split("_")] if name in window else [default, default]
    )
    size_in, size_out = left.dims[inputs.index(str(axis))], out.dims[outputs.index(str(axis))]
    pairs *= joined_pairs(
      size_in,
      right.dims[kernel.index(str(axis))],
      size_out,
      values("stride", 1)[0],
      values("pad", 0)[0],
      values("lhs_dilate", 1)[0],
      values("rhs_dilate", 1)[0],
    )
  groups = int(x.attribute("batch_group_count") or 1)
  batch, features = out.dims[outputs.index("b")], out.dims[outputs.index("f")]
  return 2 * batch * features * right.dims[kernel.index("i")] * pairs // groups


def _library_flops(x: Instruction, computation: Computation) -> int:
  """Counts a product of cuBLAS, or a convolution of cuDNN and its derivatives; other calls count as 0."""
  if found := re.search(r'"__cudnn\$conv(?:BiasActivation)?(Forward|BackwardInput|BackwardFilter)', x.attributes):
    first, second = (operand.arrays[0] for operand in computation.operands(x)[:2])
    result = x.arrays[0]
    # The labels and the window of a derivative are those of the convolution itself.
    of_forward = {
      "Forward": (first, second, result),
      "BackwardInput": (result, second, first),
      "BackwardFilter": (first, result, second),
    }
    return _joined_flops(x, *of_forward[found[1]])
  if '"__cublas$' in x.attributes:
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.attributes)
    return _dot_flops(x, computation, found[1]) if found else 0
  return 0


_FLOPS: dict[str, Callable[[Instruction, Computation], int]] = {
  "dot": _dot_flops,
  "convolution": _convolution_flops,
  "custom-call": _library_flops,
}


def kernel_cycles(run: Run) -> int:
  """Returns the TPU compiler's estimate of cycles for one run of a kernel; 0 of other instructions and devices."""
  found = re.search(r'"estimated_cycles":"(\d+)"', run.instruction.attributes) if run.scheduled else None
  return int(found[1]) if found else 0


def custom_kernels(module: Module) -> int:
  """Returns how often cuDNN's attention runs, whose FLOPs are not in the HLO."""
  return sum(run.times for run in module.runs() if 'custom_call_target="__cudnn$fmha' in run.instruction.attributes)
