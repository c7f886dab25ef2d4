"""Compiles programs, times them side by side, and tells what they cost."""

from collections.abc import Callable
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
class Program:
  """A compiled function."""

  run: Any  # jax's compiled object, to be called
  seconds: float  # that lowering and compiling took
  digest: str  # the same for the same program


class Compiler:
  """Compiles functions ahead of time; the same program only once."""

  def __init__(self):
    self._programs = {}

  def __call__(self, fn: Callable, args: tuple, precision: str | None = None, donated: bool = False) -> Program:
    """Compiles fn for args.

    Args:
      fn: a pure function.
      args: its arguments, or their shapes.
      precision: of its products where it sets none; None: jax's own.
      donated: the first argument may be overwritten.
    """
    begun = time.perf_counter()
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
      lowered = jax.jit(fn, donate_argnums=0 if donated else ()).lower(*args)
    digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
    if digest not in self._programs:
      self._programs[digest] = Program(lowered.compile(), time.perf_counter() - begun, digest)
    return self._programs[digest]


def time_rounds(
  programs: dict[str, Callable],
  args: tuple,
  repeats: int,
  limit: float = float("inf"),
  carried: bool = False,
  warm_up: dict[str, Callable] | None = None,
) -> dict[str, list[float]]:
  """Times programs in rounds; a round calls each once, and their order turns from round to round.

  Args:
    programs: by name.
    args: of each.
    repeats: timed rounds; one that is not timed goes before them.
    limit: seconds after which no round begins, but one is timed in any case.
    carried: the first output of a call is the first argument of the next.
    warm_up: what the round that is not timed calls, where running the programs twice would take too long.

  Returns:
    seconds of each program's calls, by name and in the order of the rounds.
  """
  seconds, begun = {name: [] for name in programs}, time.perf_counter()
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
  """Returns the FLOP/s of the fastest of a few matrix products, square and oblong, each by the median of `repeats`."""
  sizes = [(1024, 1024, 1024), (2048, 2048, 2048), (512, 1024, 4096)]
  if jax.default_backend() != "cpu":
    sizes = [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 1024, 4096)]
  keys = jax.random.split(jax.random.key(0))  # random, as zeros take less power and may so be faster
  product = jax.jit(functools.partial(jnp.matmul, precision=precision))
  rates = []
  for m, k, n in sizes:
    args = jax.random.normal(keys[0], (m, k), dtype), jax.random.normal(keys[1], (k, n), dtype)
    seconds = time_rounds({"": product}, args, repeats)[""]
    rates.append(2 * m * k * n / statistics.median(seconds))
  return max(rates)


def xla_flops(program) -> float | None:
  """Returns XLA's count of a compiled program, where it gives one: elementwise work too, loop bodies only once."""
  count = (program.cost_analysis() or {}).get("flops", 0)
  return count if count > 0 else None


def program_bytes(program) -> int | None:
  """Returns the memory of a compiled program: arguments, outputs, temporaries; a donated argument counts once."""
  m = program.memory_analysis()
  if m is None:
    return None
  return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def device_peak_bytes() -> int | None:
  """Returns the most that this process ever held on the first device; None where the device does not tell (CPU)."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def digits(x: float) -> str:
  """Three digits or more, without exponent."""
  return f"{x:.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.001 else f"{x:.6f}"
