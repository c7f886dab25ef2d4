"""Reading the orbax checkpoints of a run: the newest that is readable, and its averaged parameters."""

from collections.abc import Callable, Mapping
import logging
import os
import sys
from typing import Any

from absl import logging as absl_logging
from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from flextok_jax.core import workdirs
from flextok_jax.core.errors import first_line
from flextok_jax.parallel import processes
from flextok_jax.weights import checksums

MEASURED = "measured"  # JSON item of a checkpoint: config fields measured on the averaged weights, {dotted name: value}

# Beginnings of orbax's warnings: of the handler that Checkpoints registers, and of items that are not asked for.
_NEEDLESS = ("Type handler registry", 'Item "%s" was found in the checkpoint, but could not')


def quiet():
  """Hides the tracebacks that orbax prints of errors that it raises as well, and _NEEDLESS; --verbosity=1 shows them.

  On a full disk these are hundreds of lines around the one line of the error.
  """
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_worth_printing)
  if sys.unraisablehook is not _print_unraisable:
    _previous_hook.append(sys.unraisablehook)
    sys.unraisablehook = _print_unraisable


_previous_hook: list[Callable] = []


def _worth_printing(record: logging.LogRecord) -> bool:
  is_orbax = record.name == "asyncio" or f"{os.sep}orbax{os.sep}" in record.pathname
  hidden = record.levelno >= logging.ERROR or str(record.msg).startswith(_NEEDLESS)
  return not is_orbax or not hidden or absl_logging.vlog_is_on(1)


def _print_unraisable(unraisable: Any):
  # From a callback of tensorstore, after orbax has closed the event loop because of an error.
  if str(unraisable.exc_value) != "Event loop is closed" or absl_logging.vlog_is_on(1):
    _previous_hook[-1](unraisable)


def directory(workdir: str | os.PathLike) -> epath.Path:
  """Returns the folder of a workdir's checkpoints, as an absolute path."""
  folder = workdirs.resolve(workdir) / "checkpoints"
  return folder if workdirs.is_remote(folder) else folder.resolve()


def split(source: str | os.PathLike) -> tuple[str, int | None]:
  """Returns (workdir, step) of WORKDIR/checkpoints/STEP, one checkpoint of a run; (source, None) of other paths."""
  head, _, step = os.fspath(source).rstrip("/").rpartition("/")
  workdir, _, name = head.rpartition("/")
  if name != "checkpoints" or not step.isdecimal() or not (epath.Path(workdir or ".") / "config.json").exists():
    return os.fspath(source), None
  return workdir or ".", int(step)


def restore_newest(
  workdir: str | os.PathLike, items: Mapping[str, Any], restore_args: Callable = ocp.args.StandardRestore
) -> tuple[int, dict[str, Any], list[int]]:
  """Restores the newest whole checkpoint. All processes call it together; nothing is written.

  The files of the items are compared with their checksums (weights/checksums.py), of which each process reads a part.

  Args:
    workdir: of the run; or WORKDIR/checkpoints/STEP, for this checkpoint alone.
    items: {name of an item: abstract tree with the shapes, dtypes and shardings to restore to}.
    restore_args: from an item's abstract tree to orbax's arguments.

  Returns:
    (step, {name: restored tree}, newer steps that cannot be read).

  Raises:
    FileNotFoundError: the workdir has no checkpoint yet.
    ValueError: no checkpoint can be read.
  """
  quiet()
  workdir, only = split(workdir)
  process = jax.process_index()
  # Each process reads on its own: if one meets a damaged file, orbax would leave the others waiting for it.
  alone = ocp.options.MultiprocessingOptions(process, {process}, f"reader_{process}")
  options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
  unreadable: list[int] = []
  reason = ""
  if not directory(workdir).is_dir():
    raise FileNotFoundError(f"workdir {workdir} has no checkpoint yet")
  with ocp.CheckpointManager(directory(workdir), options=options) as reader:
    for step in sorted(reader.all_steps(), reverse=True) if only is None else [only]:
      folder = directory(workdir) / str(step)
      restored: dict[str, Any] = {}

      def verify(folder=folder):
        checksums.verify(folder, items, process, jax.process_count())

      def restore(step=step, restored=restored):
        composite = reader.restore(step, args=ocp.args.Composite(**{k: restore_args(v) for k, v in items.items()}))
        restored.update({name: composite[name] for name in items})
        _check_complete(restored)

      problem = _problem(verify) or _problem(restore)
      if not problem:
        return step, restored, unreadable
      reason = reason or f"checkpoint {folder} cannot be read ({problem})"
      if only is not None:
        raise ValueError(f"{reason}: take another step in {directory(workdir)}")
      if processes.is_process_0():
        absl_logging.warning("checkpoint %s cannot be read (%s): trying the one before", folder, problem)
      unreadable.append(step)
  if not unreadable:
    raise FileNotFoundError(f"workdir {workdir} has no checkpoint yet")
  raise ValueError(f"{reason}, nor any before it: repair it, or start a new run in another workdir")


def _problem(function: Callable[[], None]) -> str:
  """Calls a function in all processes; returns what it raised in any of them, "" if nothing."""
  problem = ""
  try:
    function()
  except Exception as e:  # orbax and tensorstore raise many kinds for a damaged file
    if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(e):
      raise  # the devices are too small, the file is not damaged
    problem = first_line(e, 200) if type(e) is ValueError else f"{type(e).__name__}: {first_line(e, 200)}"
  return processes.first_message(problem)


def restore_average(
  workdir: str | os.PathLike, params: dict, frozen: dict, measured: bool = False
) -> tuple[dict, dict[str, float]]:
  """Restores the newest readable averaged parameters of a run.

  Args:
    workdir: of the run; or WORKDIR/checkpoints/STEP, for this checkpoint alone.
    params: abstract tree of the trained parameters; top-level parts that it lacks are not read.
    frozen: abstract tree of the frozen parameters, likewise.
    measured: whether the checkpoint holds measured config fields (item MEASURED).

  Returns:
    (params joined with frozen, measured config fields by dotted name).

  Raises:
    FileNotFoundError: the workdir has no checkpoint yet.
    ValueError: no checkpoint can be read, or the newest that can be has parameters that are not finite.
  """
  items: dict[str, Any] = {name: tree for name, tree in dict(ema=params, frozen=frozen).items() if tree}
  if measured:
    items[MEASURED] = None
  step, restored, _ = restore_newest(workdir, items, _restore_part)
  fields = restored.pop(MEASURED, {})
  all_finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))  # one program for all arrays
  for path, finite in jax.tree_util.tree_leaves_with_path(all_finite(restored)):
    if not finite:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise ValueError(f"checkpoint {os.path.join(directory(workdir), str(step))}: {name} has NaN or infinite values")
  return {name: tree for part in restored.values() for name, tree in part.items()}, fields


def _restore_part(abstract: dict | None) -> ocp.args.CheckpointArgs:
  """Returns arguments that restore an abstract tree, which may be a part of the stored one; None: a JSON item."""
  if abstract is None:
    return ocp.args.JsonRestore()
  args = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.args.PyTreeRestore(abstract, restore_args=args, partial_restore=True)


def _check_complete(restored: dict):
  """Raises ValueError if an array was not in the checkpoint: a partial restore leaves it abstract."""
  for path, x in jax.tree_util.tree_leaves_with_path(restored):
    if isinstance(x, jax.ShapeDtypeStruct):
      raise ValueError(f"no array {jax.tree_util.keystr(path)}")
