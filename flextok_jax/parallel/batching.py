"""Runs functions over any number of rows, in padded batches of one size, on all devices of a mesh."""

from collections.abc import Callable, Iterable, Iterator
import itertools
from typing import Any

import jax
import numpy as np

from flextok_jax.core.progress import track
from flextok_jax.parallel import sharding


def batch_rows(batch_size: int, count: int, mesh: jax.sharding.Mesh | None = None) -> int:
  """Returns the rows per batch: at most batch_size and count, rounded up to a multiple of the parts of a batch."""
  parts = 1 if mesh is None else sharding.batch_parts(mesh)
  return -(-min(batch_size, count) // parts) * parts


def slices(rows: Any, size: int, start: int = 0) -> Iterator[Any]:
  """Yields consecutive slices [size, ...] of a tree of arrays [n, ...] from row `start` on; the last may be shorter.

  A leaf needs `shape` and slicing only, so images may be read from files as they are needed.
  """
  count = jax.tree.leaves(rows)[0].shape[0]
  for first in range(start, count, size):
    yield jax.tree.map(lambda x: x[first : first + size], rows)  # noqa: B023 called at once


def map_batches(
  function: Callable, batches: Iterable[Any], size: int, mesh: jax.sharding.Mesh | None = None
) -> Iterator[Any]:
  """Applies a function to batches, each padded to `size` rows with its last row; yields results without the padding.

  The next batch is dispatched before the result of the previous one is fetched. If the mesh spans several processes,
  each of them passes the same batches and gets all results.

  Args:
    function: batch -> tree of arrays [size, ...]; a row of the result depends on the same row of the batch alone. Over
      several processes the arrays must be replicated (out_shardings of jax.jit).
    batches: trees of numpy arrays [b, ...] with 1 <= b <= size.
    size: rows per batch, a multiple of the parts of a batch (see batch_rows).
    mesh: devices that batches are split over; None: the function gets numpy arrays.

  Yields:
    Trees of numpy arrays [b, ...].
  """
  waiting = None  # a batch whose result is still being computed
  for batch in itertools.chain(batches, [None]):
    begun = None
    if batch is not None:
      padded = jax.tree.map(lambda x: _pad(x, size), batch)
      placed = padded if mesh is None else sharding.place(padded, sharding.batch_sharding(mesh))
      begun = len(jax.tree.leaves(batch)[0]), function(placed)
    if waiting is not None:
      count, result = waiting
      yield jax.tree.map(lambda x: x[:count], jax.device_get(result))  # noqa: B023 called at once
    waiting = begun


def apply_in_batches(
  function: Callable, rows: Any, batch_size: int | None, what: str, progress: bool | None = False
) -> Any:
  """Returns a function of all rows, computed in batches of one size, so that it is compiled once.

  Args:
    function: batch -> tree of arrays [b, ...]; a row of the result depends on the same row of the batch alone.
    rows: tree of numpy arrays [n, ...].
    batch_size: rows per batch at most; None: all.
    what: the rows, as a progress bar names them.
    progress: whether to show one, see core.progress.Bar.
  """
  count = len(jax.tree.leaves(rows)[0])
  size = batch_rows(batch_size or count, count)
  results = map_batches(function, slices(rows, size), size)
  shown = track(results, count, what, progress, size=lambda result: len(jax.tree.leaves(result)[0]))
  return jax.tree.map(lambda *parts: jax.numpy.concatenate(parts), *shown)


class Batched:
  """A function (params, *arrays [b, ...]) -> tree of arrays [b, ...] that takes and returns numpy arrays of any length.

  Args:
    function: traceable by jax; a row of its result depends on the same row of its arguments alone.
    params: its first argument, a tree of arrays. Those that are not yet on the devices of the mesh are replicated.
    batch_size: rows per batch at most, rounded up to a multiple of the parts of a batch.
    mesh: devices to use, of one or several processes; None: all devices.
    what: rows, as a bar on a terminal names them while they are computed; "": no bar.
  """

  def __init__(
    self, function: Callable, params: Any, batch_size: int, mesh: jax.sharding.Mesh | None = None, what: str = ""
  ):
    self._what = what
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._function = jax.jit(function, out_shardings=sharding.replicated(self._mesh))
    self._params = replicate(params, self._mesh)
    self._batch_size = batch_size

  def __call__(self, *arrays: np.ndarray) -> Any:
    """Returns the function of all rows, of which there is at least one."""
    return jax.tree.map(lambda *x: np.concatenate(x), *self.batches(*arrays))

  def batches(self, *arrays: np.ndarray) -> Iterator[Any]:
    """Yields the function of all rows, batch by batch."""
    size = batch_rows(self._batch_size, arrays[0].shape[0], self._mesh)
    compute = lambda batch: self._function(self._params, *batch)
    found = map_batches(compute, slices(arrays, size), size, self._mesh)
    rows = lambda batch: len(jax.tree.leaves(batch)[0])
    return track(found, len(arrays[0]), self._what, None if self._what else False, size=rows, transient=True)


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns a tree of arrays on the devices of a mesh; arrays that are there already, whole or split, are unchanged."""
  devices, replicated = set(mesh.devices.flat), sharding.replicated(mesh)

  def put(x):
    there = isinstance(x, jax.Array) and x.sharding.device_set == devices
    return x if there else sharding.place(x, replicated)

  return jax.tree.map(put, tree)


def _pad(rows: np.ndarray, size: int) -> np.ndarray:
  return np.pad(rows, ((0, size - len(rows)), *((0, 0),) * (rows.ndim - 1)), mode="edge")
