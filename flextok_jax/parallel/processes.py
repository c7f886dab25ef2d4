"""Runs of several processes: how they join, agree and stop.

All processes run the same command on their own devices. The environment says which processes belong to a run:

- JAX_COORDINATOR_ADDRESS=HOST:PORT (a free port on the host of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, set by
  whatever starts the processes, such as launch/local.sh or a Kubernetes pod. JAX_NUM_PROCESSES=1 means a single
  process, whatever else is set.
- Slurm: the tasks of srun.
- TPU VMs: all hosts of the slice or slices.

The workdir must be the same folder in all processes. Only process 0 writes to it, except for checkpoints, of which each
process writes the shards on its devices.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import os
import signal
import sys
import threading
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from flextok_jax.core import progress

_MESSAGE = 400  # bytes at most
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
  """Connects to the other processes of this run, if there are any; call it before JAX initialises its devices.

  Raises:
    ValueError: only some of the variables are set, or they contradict each other.
    OSError: the other processes cannot be reached.
  """
  given = {name: os.environ[name] for name in _EXPLICIT if os.environ.get(name)}
  if given.get("JAX_NUM_PROCESSES") == "1":
    return
  arguments: dict[str, Any] = {}
  if given:
    address, count, index = (given.get(name, "") for name in _EXPLICIT)
    if ":" not in address or not count.isdecimal() or not index.isdecimal() or int(index) >= int(count):
      raise ValueError(
        f"{', '.join(f'{k}={v}' for k, v in given.items())}: a process of several needs JAX_COORDINATOR_ADDRESS="
        "HOST:PORT, JAX_NUM_PROCESSES=N and JAX_PROCESS_ID from 0 to N - 1"
      )
    arguments = dict(
      coordinator_address=address,
      num_processes=int(count),
      process_id=int(index),
      cluster_detection_method="deactivate",
    )
  elif not _in_slurm_step() and not _on_tpu_vm():
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # no effect on other devices
  try:
    jax.distributed.initialize(**arguments)
  except (RuntimeError, ValueError, OSError) as e:  # the network libraries raise several types
    raise OSError(f"cannot join the other processes ({e}); JAX_NUM_PROCESSES=1 runs this one alone") from e


def _in_slurm_step() -> bool:
  """Returns whether srun started several tasks; a process started without srun in an allocation is alone."""
  return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _on_tpu_vm() -> bool:
  """Returns whether this host has TPU chips that JAX will use."""
  from jax._src import cloud_tpu_init  # JAX offers no public check before the chips are initialised

  platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
  return cloud_tpu_init.running_in_cloud_tpu_vm and "tpu" in (platforms or "tpu")


@contextlib.contextmanager
def exit_on_failure() -> Iterator[None]:
  """Exits this process immediately if the body fails, skipping JAX's shutdown barrier.

  At the barrier JAX would wait for the other processes, which wait for this one; they are stopped once it has exited.
  In a process that has not connected to others the exception propagates as usual.
  """
  try:
    yield
  except BaseException as e:
    code = e.code if isinstance(e, SystemExit) else 1
    if not jax.distributed.is_initialized() or not code:
      raise
    if not isinstance(e, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def is_process_0() -> bool:
  """Returns whether this is process 0, which alone writes files and prints."""
  return jax.process_index() == 0


def log_on_process_0(text: str) -> None:
  """Prints a line on process 0 only."""
  if is_process_0():
    progress.write(text)


def true_on_all_processes(condition: bool) -> bool:
  """Returns whether the condition holds in every process; all processes must call it."""
  if jax.process_count() == 1:
    return condition
  return bool(np.all(multihost_utils.process_allgather(np.bool_(condition))))


def first_message(text: str) -> str:
  """Returns the first text that is not empty of those of all processes, which must all call it; "" if none is."""
  if jax.process_count() == 1:
    return text
  own = np.zeros(_MESSAGE, np.uint8)
  data = text.encode(errors="replace")[:_MESSAGE]
  own[: len(data)] = np.frombuffer(data, np.uint8)
  texts = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(own))
  return next(filter(None, texts), "")


def least(value: float) -> float:
  """Returns the smallest of the values of all processes, which must all call it."""
  return value if jax.process_count() == 1 else float(multihost_utils.process_allgather(np.float64(value)).min())


def same_on_all_processes(text: str) -> bool:
  """Returns whether all processes, which must all call it, give the same text."""
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  return jax.process_count() == 1 or bool((multihost_utils.process_allgather(digest) == digest).all())


def run_on_process_0(function: Callable[[], Any]) -> None:
  """Calls the function on process 0 only; all processes must call this.

  Raises:
    ValueError, OSError: what the function raised on process 0; on the other processes a ValueError.
  """
  error = None
  if is_process_0():
    try:
      function()
    except (ValueError, OSError) as e:
      error = e
  succeeded = true_on_all_processes(error is None)
  if error is not None:
    raise error
  if not succeeded:
    raise ValueError("stopped: see the error message of process 0")


def gather_on_process_0(tree: Any) -> Any:
  """Returns a tree of global arrays as arrays that process 0 can read; on the other processes each leaf is None.

  One array is gathered at a time: for that moment every device holds the whole of it.
  """
  if jax.process_count() == 1:
    return tree

  def gather(x):
    x = multihost_utils.process_allgather(x, tiled=True)
    return x if is_process_0() else None

  return jax.tree.map(gather, tree)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
  """Replaces the handler of SIGTERM: a preempted run can save before it exits. Restores the old handler afterwards.

  Yields:
    A function of the step number that returns whether SIGTERM was received. With several processes all must call it
    after every step. All get True after the same step, at most a few seconds after any of them received the signal: JAX
    agrees on the step over the network of its coordinator, without the devices.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():  # others get no signals
    yield lambda step: False
    return
  received = []
  previous = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
  try:
    yield lambda step: bool(received)
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)  # None: not set from Python
