"""Compiles programs, times them side by side, and reports their memory and FLOPs."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import hashlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled function."""

  run: Any  # jax's compiled object, callable
  seconds: float  # of lowering and compilation
  digest: str  # hash of the program's text


class Compiler:
  """Compiles functions ahead of time; a program only once."""

  def __init__(self):
    self._programs: dict[str, Compiled] = {}

  def __call__(self, fn: Callable, args: tuple, precision: str | None = None, donated: bool = False) -> Compiled:
    """Compiles fn for args.

    Args:
      fn: a pure function.
      args: its arguments, or their shapes.
      precision: of matmuls for which the function sets none; None: jax's default.
      donated: whether the first argument may be overwritten.
    """
    begun = time.perf_counter()
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
      lowered = jax.jit(fn, donate_argnums=0 if donated else ()).lower(*args)
    digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
    if digest not in self._programs:
      self._programs[digest] = Compiled(lowered.compile(), time.perf_counter() - begun, digest)
    return self._programs[digest]


def time_rounds(
  programs: Mapping[Any, Callable],
  args: tuple,
  repeats: int,
  limit: float = float("inf"),
  carried: bool = False,
  warm_up: Mapping[Any, Callable] | None = None,
) -> dict[Any, list[float]]:
  """Times programs in rounds: a round calls each once, in alternating order.

  Args:
    programs: {name: function}.
    args: of every function.
    repeats: number of timed rounds; one untimed round precedes them.
    limit: seconds after which no further round starts; one is always timed.
    carried: whether the first output of a call is the first argument of the next.
    warm_up: functions of the untimed round, if calling the programs twice takes too long.

  Returns:
    {name: seconds of each timed call}.
  """
  seconds: dict[Any, list[float]] = {name: [] for name in programs}
  begun = time.perf_counter()
  for index in range(repeats + 1):
    if index > 1 and time.perf_counter() - begun > limit:
      break
    called = programs if index or warm_up is None else warm_up
    for name in list(called)[:: -1 if index % 2 else 1]:
      start = time.perf_counter()
      outputs = jax.block_until_ready(called[name](*args))
      if index:
        seconds[name].append(time.perf_counter() - start)
      if carried:
        args = (outputs[0], *args[1:])
  return seconds


def matmul_peak(dtype: str, precision: str | None, repeats: int = 5) -> float:
  """Returns the FLOP/s of the fastest of a few matmuls, square and oblong; each is the median of `repeats`."""
  sizes = [(1024, 1024, 1024), (2048, 2048, 2048), (512, 1024, 4096)]
  if jax.default_backend() != "cpu":
    sizes = [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 1024, 4096)]
  keys = jax.random.split(jax.random.key(0))  # random: zeros take less power and may be faster
  product = jax.jit(functools.partial(jnp.matmul, precision=precision))
  rates = []
  for m, k, n in sizes:
    args = jax.random.normal(keys[0], (m, k), dtype), jax.random.normal(keys[1], (k, n), dtype)
    seconds = time_rounds({"": product}, args, repeats)[""]
    rates.append(2 * m * k * n / statistics.median(seconds))
  return max(rates)


def xla_flops(program) -> float | None:
  """Returns XLA's FLOP count of a compiled program, or None: with elementwise work, loop bodies counted once."""
  count = (program.cost_analysis() or {}).get("flops", 0)
  return count if count > 0 else None


def program_bytes(program) -> int | None:
  """Returns the bytes of a compiled program: arguments, outputs, temporaries; a donated argument counts once."""
  m = program.memory_analysis()
  if m is None:
    return None
  return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def device_peak_bytes() -> int | None:
  """Returns this process's peak memory on the first device, or None if the device does not report it (CPU)."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def digits(x: float) -> str:
  """Formats a number with at least three significant digits and without exponent."""
  return f"{x:.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.001 else f"{x:.6f}"
