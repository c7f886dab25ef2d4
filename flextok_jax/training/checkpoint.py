"""Checkpoints of a run (orbax); one workdir belongs to one config, and to one process group at a time."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
from pathlib import Path
import socket
from typing import Any

from absl import logging
from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp

from flextok_jax.config import flatten, read_config
from flextok_jax.core import files, workdirs
from flextok_jax.core.errors import first_line, quote
from flextok_jax.parallel import processes, sharding
from flextok_jax.training.state import TrainState
from flextok_jax.weights import checksums, orbax

# Fields that may change when a run is resumed; a change of any other field is an error.
_FREE = ("train.", "eval.", "sampler.", "mesh.", "remat", "profile_steps", "init_from")
_FIXED = ("train.parts",)  # although their section is in _FREE
_FREE_DATA = ("data.num_threads", "data.num_workers", "data.prefetch", "data.max_unreadable")
# A loss above the lowest one by more than this share of it is not sane: those of healthy runs differ by a few percent.
_SANE = 0.1
_MIN_PART = 2**20  # bytes
_LOSS = "training"  # JSON item of a checkpoint: {"loss": mean training loss of the steps before it}
FREE_AR = ("ar.loss_chunk", "ar.guidance_scale", "ar.temperature", "ar.top_k", "ar.top_p")


def check_workdir(workdir: str, config: ConfigDict) -> None:
  """Checks that the workdir holds no run of another config.

  Raises:
    ValueError: a field differs, which the message names, or config.json in the workdir is not a complete config.
  """
  if not (epath.Path(workdir) / "config.json").exists():
    return
  old, new = flatten(read_config(workdir)), flatten(config)
  for name in sorted(new):
    free = name.startswith(_FREE) and name not in _FIXED or name in _FREE_DATA + FREE_AR
    if old[name] != new[name] and not free:
      raise ValueError(
        f"workdir {workdir} belongs to another config: {name} is {old[name]!r} there and {new[name]!r} here; "
        f"use another workdir, or set {name}={quote(old[name])}"
      )


def claim_workdir(workdir: str, config: ConfigDict) -> None:
  """Checks the workdir (check_workdir) and writes the config to config.json there."""
  check_workdir(workdir, config)
  data = (config.to_json(indent=1) + "\n").encode()
  if workdirs.is_remote(workdir):  # objects of buckets are written whole or not at all
    (epath.Path(workdir) / "config.json").write_bytes(data)
  else:
    files.write_file(Path(workdir) / "config.json", data)


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
  """Keeps other runs out of the workdir while the body runs; makes the workdir if it is missing, and tries it.

  In a bucket that is a workdirs.Lease. Elsewhere process 0 holds flock on WORKDIR/.lock, which the kernel releases when
  that process ends for whatever reason. If the file system has no flock (some FUSE and NFS mounts), a warning is logged
  and the workdir is not locked. Some file systems (gcsfuse) lock within one machine only: a run on another machine is
  then not noticed.

  Raises:
    ValueError: another run uses the workdir, or it cannot be written.
  """
  with contextlib.ExitStack() as stack:
    processes.run_on_process_0(lambda: _lock(workdir, stack))
    yield


def _lock(workdir: str, stack: contextlib.ExitStack):
  workdirs.check_writable(epath.Path(workdir))
  if workdirs.is_remote(workdir):
    stack.enter_context(contextlib.closing(workdirs.Lease(epath.Path(workdir))))
    return
  path = Path(workdir) / ".lock"
  file = stack.enter_context(files.open_regular(path))
  try:
    if files.lock(file):
      files.clear_leftovers(Path(workdir))
    else:
      logging.warning("%s cannot be locked here: make sure that no other run uses %s", path, workdir)
  except BlockingIOError:
    file.seek(0)
    owner = file.read(200).decode(errors="replace").strip() or "unknown"
    raise ValueError(f"another run ({owner}) uses {workdir}: stop it, or use another workdir") from None
  file.truncate(0)
  file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
  file.flush()


def _items(state: TrainState) -> dict:
  return {name: tree for name, tree in vars(state).items() if name != "step" and tree}  # orbax stores no empty tree


class Checkpoints:
  """The checkpoints of a workdir, written asynchronously and atomically.

  The newest `keep` are kept, those of steps that are multiples of `keep_period` (0: none), and of those before the
  newest the one with the lowest training loss: when a run diverges, the newest ones may be useless already. All
  processes of a run call all methods. Arrays can be restored to any mesh, whatever mesh and number of processes wrote
  them.

  Args:
    workdir: of the run.
    keep: how many of the newest to keep.
    keep_period: steps.
    own: no other run uses the workdir (see locked), so partial writes of a killed run are removed.
  """

  def __init__(self, workdir: str, keep: int = 1, keep_period: int = 0, *, own: bool = False):
    orbax.quiet()
    # Orbax would cut each array into a part per device that holds it, by a program for each shape; small ones are
    # written by one device.
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_PART)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    self._keep, self._keep_period = keep, keep_period
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self,
      cleanup_tmp_directories=own,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
    )
    self._workdir = workdir
    self._manager = ocp.CheckpointManager(orbax.directory(workdir), options=options)
    self._losses = {step: self._read_loss(step) for step in self._manager.all_steps()}
    self._saving: int | None = None  # step of the last checkpoint whose writing began

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns which checkpoints, in the order of their steps, to keep (orbax's PreservationPolicy)."""
    steps = [x.step for x in checkpoints]
    kept = {*steps[-self._keep :], *(step for step in steps if self._keep_period and step % self._keep_period == 0)}
    older = [step for step in steps[:-1] if math.isfinite(self._losses.get(step, math.inf))]
    if older:
      kept.add(min(older, key=lambda step: (self._losses[step], -step)))
    return [step in kept for step in steps]

  def sane(self, before: int) -> tuple[int, float] | None:
    """Returns (step, loss) of the newest checkpoint before a step whose training loss was near the lowest one, if any.

    The checkpoint just before `before` is left out: no update has shown yet that training can go on from it.
    """
    losses = {step: x for step, x in self._losses.items() if step < before - 1 and math.isfinite(x)}
    stored = [step for step in self._manager.all_steps() if step in losses]
    limit = min(losses.values(), default=0.0)
    limit += _SANE * abs(limit)
    return max(((step, losses[step]) for step in stored if losses[step] <= limit), default=None)

  def _read_loss(self, step: int) -> float:
    try:
      return float(json.loads((self._folder(step) / _LOSS / "metadata").read_text())["loss"])
    except (OSError, ValueError, KeyError, TypeError):  # saved without it, or damaged
      return math.inf

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, measured: Mapping[str, float] | None = None, loss: float = math.inf) -> None:
    """Starts to save the state under its step; does nothing if that step is saved already.

    Args:
      state: of the run.
      measured: config fields measured on this state, {dotted name: value}.
      loss: mean training loss of the steps before it.

    Raises:
      OSError: this checkpoint, or the one before in the background, could not be written.
    """
    step = int(state.step)
    if step == self._manager.latest_step():
      return
    args = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
    args[_LOSS] = ocp.args.JsonSave({"loss": loss})
    if measured:
      args[orbax.MEASURED] = ocp.args.JsonSave(dict(measured))
    with self._failures_named():
      self._manager.wait_until_finished()  # of the one before
      self._saving, self._losses[step] = step, loss
      self._manager.save(step, args=ocp.args.Composite(**args), force=True)

  def restore(self, state: TrainState) -> TrainState:
    """Returns the newest readable checkpoint in the shapes, dtypes and shardings of an abstract state.

    Newer ones are renamed to STEP.unreadable, so that the run can write these steps again.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: none can be read; then nothing is renamed.
    """
    step, restored, unreadable = orbax.restore_newest(self._workdir, _items(state))
    if unreadable:
      processes.run_on_process_0(lambda: [self._set_aside(step) for step in unreadable])
      self._manager.reload()
    # Also the step has its place: otherwise the first update of a resumed run would be a program of its own.
    place: Any = state.step.sharding
    return state.replace(step=sharding.place(np.int32(step), place), **restored)

  def _set_aside(self, step: int):
    folder = self._folder(step)
    aside = folder.with_name(f"{step}.unreadable")
    aside.rmtree(missing_ok=True)  # left from an earlier time that this step was damaged
    folder.rename(aside)

  def _folder(self, step: int | None) -> epath.Path:
    return self._manager.directory / str(step)

  def _write_checksums(self):
    """Called by orbax when all items are written, before the checkpoint gets its name."""
    if processes.is_process_0():
      checksums.write(self._manager.directory, self._saving)

  @contextlib.contextmanager
  def _failures_named(self):
    try:
      yield
    except Exception as e:  # orbax and tensorstore raise many types for a full disk
      raise OSError(
        f"checkpoint {self._folder(self._saving)} cannot be written ({type(e).__name__}: {first_line(e, 200)}); older "
        "ones are untouched: make room, and rerun the same command"
      ) from e

  def wait(self) -> None:
    """Waits until saving has finished; raises OSError as save does."""
    with self._failures_named():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until saving has finished; raises OSError as save does."""
    with self._failures_named():
      self._manager.close()
