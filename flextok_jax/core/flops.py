"""FLOPs of a program: the matrix products and convolutions in its jaxpr, with loops multiplied out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import itertools
import math
from typing import Any, cast

import jax
from jax.extend import core


def count(fn: Callable, *args: Any, while_trips: int | Sequence[int] = 1) -> int:
  """Returns the FLOPs of fn(*args), which is traced and not run.

  A product [m, k] x [k, n] counts 2 m k n; a convolution 2 for each pair of an output and an input that its kernel
  joins, without products with padding. Elementwise work (norms, activations, softmax, optimiser) is left out: a few
  percent of models of usable size. What `jax.checkpoint` recomputes is counted.

  Args:
    fn: a function of arrays. Attention must be the "xla" implementation: what custom kernels compute is not counted.
    *args: its arguments, arrays or ShapeDtypeStructs.
    while_trips: trip count assumed for data-dependent loops (`lax.while_loop`), or one for each in program order.

  Raises:
    ValueError: a Pallas kernel, or fewer trip counts than loops.
  """
  return count_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr, while_trips)


def count_jaxpr(jaxpr: core.Jaxpr, while_trips: int | Sequence[int] = 1) -> int:
  """Returns the FLOPs of a traced program; see count."""
  return _count(jaxpr, _trips(while_trips))


def equations(jaxpr: core.Jaxpr, while_trips: int | Sequence[int] = 1) -> Iterator[tuple[core.JaxprEqn, int]]:
  """Yields each equation of a program, those of inner programs too, with the number of times that it runs.

  All branches of a conditional are yielded as if each ran; count takes the largest.
  """
  return _equations(jaxpr, _trips(while_trips))


def _trips(while_trips: int | Sequence[int]) -> Iterator[int]:
  return itertools.repeat(while_trips) if isinstance(while_trips, int) else iter(while_trips)


def _count(jaxpr: core.Jaxpr, trips: Iterator[int]) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    times, inner = _times(eqn, trips), [_count(x, trips) for x in _inner(eqn)]
    total += _product(eqn) + times * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
  return total


def _equations(jaxpr: core.Jaxpr, trips: Iterator[int]) -> Iterator[tuple[core.JaxprEqn, int]]:
  for eqn in jaxpr.eqns:
    yield eqn, 1
    times = _times(eqn, trips)
    for inner in _inner(eqn):
      yield from ((e, n * times) for e, n in _equations(inner, trips))


def _times(eqn: core.JaxprEqn, trips: Iterator[int]) -> int:
  """Returns how often the programs inside of an equation run."""
  match eqn.primitive.name:
    case "scan":
      return eqn.params["length"]
    case "while":
      if (times := next(trips, None)) is None:
        raise ValueError("while_trips has fewer trip counts than the program has while loops")
      return times
    case "shard_map":  # its program is that of one device
      return eqn.params["mesh"].size
    case "pallas_call":
      raise ValueError("FLOPs of Pallas kernels cannot be counted: trace the program with attention='xla'")
  return 1


def _inner(eqn: core.JaxprEqn) -> Iterable[core.Jaxpr]:
  for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, core.Jaxpr)):
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value


def _product(eqn: core.JaxprEqn) -> int:
  """Returns the FLOPs of a matrix product or convolution, 0 for every other equation."""
  p = eqn.params
  inputs, outputs = ([cast(jax.core.ShapedArray, x.aval) for x in xs] for xs in (eqn.invars, eqn.outvars))
  if eqn.primitive.name == "dot_general":
    contracted = p["dimension_numbers"][0][0]
    return 2 * outputs[0].size * math.prod(inputs[0].shape[axis] for axis in contracted)
  if eqn.primitive.name != "conv_general_dilated":
    return 0
  axes, shape = p["dimension_numbers"], outputs[0].shape
  image, kernel = (x.shape for x in inputs)
  flops = 2 * math.prod(shape[axis] for axis in axes.out_spec[:2]) * kernel[axes.rhs_spec[1]]
  for i, (stride, (low, _)) in enumerate(zip(p["window_strides"], p["padding"])):
    sizes = image[axes.lhs_spec[i + 2]], kernel[axes.rhs_spec[i + 2]], shape[axes.out_spec[i + 2]]
    flops *= joined_pairs(*sizes, stride, low, p["lhs_dilation"][i], p["rhs_dilation"][i])
  return flops


@functools.cache
def joined_pairs(inputs: int, taps: int, outputs: int, stride: int, low: int, dilate_in: int, dilate_taps: int) -> int:
  """Returns the number of (output, tap) pairs along an axis that meet an input, not padding or a hole of a dilation."""
  last, pairs = (inputs - 1) * dilate_in, 0
  for tap in range(taps):
    places = (output * stride + tap * dilate_taps - low for output in range(outputs))
    pairs += sum(0 <= place <= last and place % dilate_in == 0 for place in places)
  return pairs
