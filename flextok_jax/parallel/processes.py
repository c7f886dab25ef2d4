"""Several processes that run one program on all their devices: how they find each other, agree and stop.

Every process runs the same command. Who they are comes from the environment:

- JAX_COORDINATOR_ADDRESS=HOST:PORT (a free port where process 0 runs), JAX_NUM_PROCESSES and JAX_PROCESS_ID: whoever
  starts the processes says it, as launch/local.sh does, or a pod of Kubernetes. JAX_NUM_PROCESSES=1: there is but one,
  whatever follows.
- Slurm: the tasks of srun.
- TPU VMs: all hosts of the slice or slices.

The workdir must be the same folder in all of them: process 0 alone writes, but for checkpoints, where each writes what
its devices hold.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize():
  """Joins the other processes of this run, if there are any; to be called before jax touches a device.

  Raises:
    ValueError: for an environment that says it half.
    OSError: when the others cannot be reached.
  """
  told = {name: os.environ[name] for name in _EXPLICIT if os.environ.get(name)}
  if told.get("JAX_NUM_PROCESSES") == "1":
    return
  arguments = {}
  if told:
    address, count, index = (told.get(name, "") for name in _EXPLICIT)
    if ":" not in address or not count.isdecimal() or not index.isdecimal() or int(index) >= int(count):
      raise ValueError(
        f"{', '.join(f'{k}={v}' for k, v in told.items())}: a process of several needs JAX_COORDINATOR_ADDRESS="
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
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # without effect on other devices
  try:
    jax.distributed.initialize(**arguments)
  except (RuntimeError, ValueError, OSError) as e:  # whatever the network and its libraries say
    raise OSError(f"cannot join the other processes ({e}); JAX_NUM_PROCESSES=1 runs this one alone") from e


def _in_slurm_step() -> bool:
  """Whether srun started this process beside others; what runs in an allocation without srun is alone."""
  return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _on_tpu_vm() -> bool:
  """Whether there are TPU chips here that jax is going to use."""
  from jax._src import cloud_tpu_init  # the one place where jax says so before it starts the chips

  return cloud_tpu_init.running_in_cloud_tpu_vm and "tpu" in (jax.config.jax_platforms or "tpu")


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
  """Ends this process when the body fails, without the farewell in which jax would wait for the others.

  They are waiting for this one, and are stopped when it is gone. A single process fails as any other.
  """
  try:
    yield
  except BaseException as e:
    code = e.code if isinstance(e, SystemExit) else 1
    if not jax.distributed.is_initialized() or jax.process_count() == 1 or not code:
      raise
    if not isinstance(e, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def is_first() -> bool:
  """Whether this is the process that writes and prints."""
  return jax.process_index() == 0


def say(text: str):
  """Prints a line, once a run."""
  if is_first():
    print(text, flush=True)


def all_agree(here: bool) -> bool:
  """Whether it is so in every process; all have to ask."""
  if jax.process_count() == 1:
    return here
  return bool(np.all(multihost_utils.process_allgather(np.bool_(here))))


def by_first(act: Callable[[], Any]):
  """Calls act in process 0; what it raises (ValueError, OSError) ends the other processes as well."""
  error = None
  if is_first():
    try:
      act()
    except (ValueError, OSError) as e:
      error = e
  agreed = all_agree(error is None)
  if error is not None:
    raise error
  if not agreed:
    raise ValueError("stopped: process 0 says why")


def fetched(tree) -> Any:
  """Returns a tree of global arrays as what process 0 can read, one array after another; others get None of each."""
  if jax.process_count() == 1:
    return tree

  def fetch(x):
    x = multihost_utils.process_allgather(x, tiled=True)  # what is split is whole on every device for a moment
    return x if is_first() else None

  return jax.tree.map(fetch, tree)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
  """Makes SIGTERM a question to ask after every step; afterwards all is as before.

  Yields a function of the step's number. Where several processes ask, each after every step, all get the answer that it
  is time after the same step, at most a few seconds after the signal came to any of them: jax watches for it in the
  background, and agrees on the step over the network of its coordinator, without the devices.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  received = []
  previous = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
  try:
    yield lambda step: bool(received)
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)  # None: not set from Python
