"""Checkpoints of a run (orbax), which workdir belongs to which config and run, and starting from other weights."""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import fcntl
import os
from pathlib import Path
import shutil
import socket

from absl import logging
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import orbax.checkpoint as ocp

from flextok_jax.config import flatten, read_config
from flextok_jax.core import files
from flextok_jax.core.errors import first_line
from flextok_jax.parallel import processes
from flextok_jax.training.state import TrainState
from flextok_jax.weights import orbax

# Fields that a resumed run may change; all others make another run of it.
_FREE = ("train.", "eval.", "sampler.", "mesh.", "remat", "profile_steps", "init_from")
_FREE_DATA = ("data.num_threads", "data.num_workers", "data.prefetch", "data.max_unreadable")
FREE_AR = ("ar.loss_chunk", "ar.guidance_scale", "ar.temperature", "ar.top_k", "ar.top_p")
# Sections that are without effect where a weight is 0, as it is in configs from before there was one.
_OFF = {"repa.": "repa.weight", **dict.fromkeys(("discriminator.", "optim.discriminator."), "discriminator.weight")}


def check_workdir(workdir: str, config: ConfigDict):
  """Checks that no run of another config lives in the workdir.

  A field that the run's config does not have yet must be off (0, empty, or of a section that is off).

  Raises:
    ValueError: naming the first field that differs.
  """
  if not os.path.exists(os.path.join(workdir, "config.json")):
    return
  old, new = flatten(read_config(workdir)), flatten(config)
  without = tuple(section for section, weight in _OFF.items() if not old.get(weight) and not new.get(weight))
  for name in sorted(old.keys() | new.keys()):
    if name not in old and (not new[name] or name.startswith(without)):
      continue
    if old.get(name) != new.get(name) and not name.startswith(_FREE) and name not in _FREE_DATA + FREE_AR:
      raise ValueError(
        f"workdir {workdir} belongs to another config: {name} is {old.get(name)!r} there and {new.get(name)!r} "
        "here; use another --workdir"
      )


def claim_workdir(workdir: str, config: ConfigDict):
  """Makes the workdir the config's own: checks it and writes config.json."""
  check_workdir(workdir, config)
  files.write_file(Path(workdir) / "config.json", (config.to_json(indent=1) + "\n").encode())


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
  """Keeps other runs out of the workdir, which is made if missing, while the body runs.

  By flock on WORKDIR/.lock in process 0: the kernel lifts it when that process ends, in whatever way. A file system
  without flock (some FUSE and NFS mounts) is warned of and used unlocked; on others that lock for their own machine
  alone (gcsfuse) a run on another machine is not noticed.

  Raises:
    ValueError: when another run is at work there.
  """
  with contextlib.ExitStack() as stack:
    processes.run_on_process_0(lambda: _lock(workdir, stack))
    yield


def _lock(workdir: str, stack: contextlib.ExitStack):
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, ".lock")
  file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 closed with the stack
  stack.enter_context(file)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    owner = file.read(200).strip() or "unknown"
    raise ValueError(f"another run ({owner}) is at work in {workdir}: stop it, or use another --workdir") from None
  except OSError as e:
    logging.warning("%s cannot be locked (%s): see to it that no other run uses %s", path, e.strerror, workdir)
  file.truncate(0)
  print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)


def _items(state: TrainState) -> dict:
  return {k: v for k, v in vars(state).items() if k != "step" and v}  # orbax stores no empty tree


class Checkpoints:
  """The checkpoints of a workdir: asynchronous, atomic; the newest few are kept, and the multiples of keep_period.

  All processes of a run call all methods. Arrays come back in any placement, whatever mesh and however many processes
  they were written from.
  """

  def __init__(self, workdir: str, keep: int = 1, keep_period: int = 0, *, own: bool = False):
    """With `own` nobody else uses the workdir (see locked): what a killed run has left half written is removed."""
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, keep_period=keep_period or None, cleanup_tmp_directories=own
    )
    self._workdir = workdir
    self._manager = ocp.CheckpointManager(orbax.directory(workdir), options=options)
    self._begun = None  # step of the last one that was begun

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: TrainState, measured: Mapping[str, float] | None = None):
    """Starts to save the state under its step; does nothing if that step is saved already.

    `measured` are fields of the config, dotted, that were measured of this state; {} or None: there are none.

    Raises:
      OSError: when this one, or the one before in the background, could not be written.
    """
    step = int(state.step)
    if step == self._manager.latest_step():
      return
    args = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
    if measured:
      args[orbax.MEASURED] = ocp.args.JsonSave(dict(measured))
    with self._failures_named():
      self._manager.wait_until_finished()  # of the one before
      self._begun = step
      self._manager.save(step, args=ocp.args.Composite(**args), force=True)

  def restore(self, state: TrainState) -> TrainState:
    """Returns the newest checkpoint that can be read, in the shapes, dtypes and shardings of an abstract state.

    Newer ones are renamed to STEP.unreadable, so that the run can write these steps again.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: when none can be read; then nothing is renamed.
    """
    step, restored, unreadable = orbax.restore_newest(self._workdir, _items(state))
    if unreadable:
      processes.run_on_process_0(lambda: [self._set_aside(step) for step in unreadable])
      self._manager.reload()
    return state.replace(step=jnp.int32(step), **restored)

  def _set_aside(self, step: int):
    aside = self._folder(step) + ".unreadable"
    shutil.rmtree(aside, ignore_errors=True)  # from an earlier time that this step was damaged
    os.rename(self._folder(step), aside)

  def _folder(self, step: int) -> str:
    return os.path.join(self._manager.directory, str(step))

  @contextlib.contextmanager
  def _failures_named(self):
    try:
      yield
    except Exception as e:  # orbax and tensorstore raise many kinds for a full disk
      raise OSError(
        f"checkpoint {self._folder(self._begun)} cannot be written ({type(e).__name__}: {first_line(e)}); older "
        "ones are untouched: make room, and rerun the same command"
      ) from e

  def close(self):
    """Waits for what is being saved; OSError as save."""
    with self._failures_named():
      self._manager.close()


def check_params(params: dict, expected: dict, origin: str):
  """Raises ValueError naming the first array that is missing, unexpected or of another shape than expected."""
  have, want = flatten_dict(params, sep="/"), flatten_dict(expected, sep="/")
  for name in sorted(have.keys() | want.keys()):
    if name not in have:
      raise ValueError(f"{origin} lacks the array {name}, which its config asks for")
    if name not in want:
      raise ValueError(f"{origin} has an array {name} that its config does not ask for")
    if have[name].shape != want[name].shape:
      raise ValueError(f"{origin}: {name} has shape {have[name].shape}, its config asks for {want[name].shape}")


def warm_start(state: TrainState, given: dict, path: str, ready: Collection[str] = ()) -> TrainState:
  """Replaces the top-level parts of a fresh state that the weights `given` hold; other trained parts stay random.

  `path` says where they come from; `ready` are the frozen parts that have their weights already.

  Raises:
    ValueError: when no part is shared, a frozen part is not there, or shapes differ.
  """
  parts = state.joined()
  shared = {k: v for k, v in given.items() if k in parts}
  missing = [k for k in state.frozen if k not in given and k not in ready]
  if missing or not shared:
    raise ValueError(f"init_from={path} holds {', '.join(given)}; needed: {', '.join(missing or parts)}")
  check_params(shared, {k: parts[k] for k in shared}, path)
  logging.info("starting from %s of %s", ", ".join(shared), path)
  parts |= shared
  params = {k: parts[k] for k in state.params}
  return state.replace(params=params, ema=jax.tree.map(jnp.copy, params), frozen={k: parts[k] for k in state.frozen})
