"""Several processes on one machine (launch/local.sh) compute the same as one, also after being killed."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from flextok_jax import train
from flextok_jax.parallel import processes, sharding
from tests.support import tiny_run
from tests.support.commands import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  return tiny_run.write_shards(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
  """The run by one process on its 8 devices, data-parallel."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  train.train(tiny_run.config_of(shards, keep_checkpoints=9), str(workdir))
  return workdir


def launch(count, *command, devices=1, timeout=900):
  """Runs a command as several processes."""
  env = environment(devices, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  return subprocess.run(
    ["bash", "launch/local.sh", str(count), *command],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
    timeout=timeout,
  )


def run_of(shards, workdir, **moment):
  """The tiny run, fully sharded."""
  return dict(shards=str(shards), mesh=dict(data=1, fsdp=-1), workdir=str(workdir), moment=moment)


def launch_runs(*runs):
  """Runs of tests/support/tiny_run.py, one after the other by 2 processes of 4 devices each."""
  return launch(2, sys.executable, "-m", "tests.support.tiny_run", json.dumps(runs), devices=4)


def same_losses(actual, expected):
  assert actual.keys() <= expected.keys() and actual
  for key, value in actual.items():
    np.testing.assert_allclose(value, expected[key], rtol=1e-5, err_msg=str(key))


def checkpoint_steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def same_weights(workdir, other):
  weights, expected = (load_file(path / "weights.safetensors") for path in (workdir, other))
  assert weights.keys() == expected.keys()
  for name, array in weights.items():
    np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def flip_bit(folder):
  """Flips a bit in a checkpoint's file of arrays that process 1 of 2 compares with its checksum; returns its name."""
  hashes = json.loads((folder / "checksums.json").read_text())
  files = sorted((item, name) for item in ("ema", "opt_state", "params") for name in hashes[item])
  name = next("/".join(file) for file in files[1::2] if "/d/" in file[1])
  data = bytearray((folder / name).read_bytes())
  data[len(data) // 2] ^= 1
  (folder / name).write_bytes(data)
  return name


def test_stopped_and_killed_processes_compute_the_same_as_one(shards, undisturbed, tmp_path, monkeypatch):
  expected = tiny_run.losses(undisturbed)
  stopped, killed = tmp_path / "stopped", tmp_path / "killed"
  # Of the second run there are checkpoints of steps 4 and 6 by one process, the latter damaged.
  for step in ("4", "6"):
    shutil.copytree(undisturbed / "checkpoints" / step, killed / "checkpoints" / step)
  harmed = flip_bit(killed / "checkpoints" / "6")
  done = launch_runs(
    run_of(shards, stopped, kind="step", step=2, process=1, name="SIGTERM"),
    run_of(shards, killed, kind="step", step=9, process=1),
  )

  # From the start on; SIGTERM to one process: both stop after the same step, which is saved.
  (line,) = [line for line in done.stdout.splitlines() if "stopped by a signal" in line]
  last = int(line.split("step ")[1].split(";")[0])
  assert 2 < last < tiny_run.STEPS and checkpoint_steps(stopped)[-1] == last
  same_losses(tiny_run.losses(stopped), expected)
  # From one process to two, from data to fsdp, from the older checkpoint; then one is killed, and the launcher ends the
  # other.
  assert done.stderr.count(f"checkpoints/6 cannot be read (file {harmed} differs from its checksum)") == 1
  assert "resuming from step 4" in done.stdout
  assert done.returncode == 137 and "process 1 ended with code 137" in done.stderr, done.stderr
  assert checkpoint_steps(killed) in ([4, 6], [4, 6, 8])
  same_losses(tiny_run.losses(killed), expected)
  assert {(8, "loss"), (6, "eval/loss")} <= tiny_run.losses(killed).keys()

  # The killed run resumes to its end; the first process writes. Its checkpoint and its weights evaluate equally.
  sources = str(killed), str(killed / "weights.safetensors")
  done = launch_runs(run_of(shards, killed), *(dict(checkpoint=source) for source in sources))
  assert done.returncode == 0 and "resuming from step" in done.stdout, done.stderr
  assert done.stdout.count("averaged weights") == 1
  same_losses(tiny_run.losses(killed), expected)
  assert tiny_run.trained(killed) == list(range(5, tiny_run.STEPS + 1))
  same_weights(killed, undisturbed)
  found = [json.loads(line)["evaluated"] for line in done.stdout.splitlines() if "evaluated" in line]
  np.testing.assert_allclose(found, [expected[tiny_run.STEPS, "eval/loss"]] * 2, rtol=1e-5)

  # The stopped one by one process: from two processes to one, from 8 devices to 2, from fsdp to data.
  make = sharding.make_mesh
  monkeypatch.setattr(sharding, "make_mesh", lambda **mesh: make(**mesh, devices=jax.devices()[:2]))
  train.train(tiny_run.config_of(shards), str(stopped))
  same_losses(tiny_run.losses(stopped), expected)
  assert tiny_run.trained(stopped) == tiny_run.trained(undisturbed)
  same_weights(stopped, undisturbed)


# The launcher.

CHILD = """
trap 'exit "$2"' TERM
if [[ $JAX_PROCESS_ID == 1 ]]; then eval "$1"; else : > "${3:-/dev/null}"; fi
for _ in $(seq 100); do sleep 0.1; done
"""


def test_the_launcher_ends_all_when_one_fails():
  done = launch(3, "bash", "-c", CHILD, "child", "exit 7", "0")
  assert done.returncode == 7 and "process 1 ended with code 7: stopping the others" in done.stderr


@pytest.mark.parametrize("code", [0, 5])
def test_the_launcher_passes_sigterm_on(code, tmp_path):
  """The parent of process 1 is the launcher; what the processes then end with is what it ends with."""
  kill = "until [[ -e $3 ]]; do sleep 0.02; done; kill -TERM $PPID"  # once process 0 is ready for it
  done = launch(2, "bash", "-c", CHILD, "child", kill, str(code), str(tmp_path / "ready"))
  assert done.returncode == code, done.stderr


def test_the_launcher_prints_its_usage():
  for arguments in ((), ("2",), ("0", "true"), ("python", "-m", "flextok_jax.train")):
    command = ["bash", "launch/local.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "launch/local.sh N COMMAND" in done.stderr


# The environment.


@pytest.fixture
def joins(monkeypatch):
  """The arguments of jax.distributed.initialize, in an environment without variables."""
  for name in (*processes._EXPLICIT, "SLURM_STEP_NODELIST", "SLURM_NTASKS"):
    monkeypatch.delenv(name, raising=False)
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs))
  return calls


def test_a_single_process_does_not_connect(joins, monkeypatch):
  processes.initialize()
  monkeypatch.setenv("SLURM_NTASKS", "8")  # in an allocation, but not started by srun
  processes.initialize()
  monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-8]")
  monkeypatch.setenv("SLURM_NTASKS", "1")
  processes.initialize()
  monkeypatch.setenv("SLURM_NTASKS", "8")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "1")  # other variables are ignored
  processes.initialize()
  assert joins == []


def test_slurm_tasks_and_explicit_processes_join(joins, monkeypatch):
  monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-8]")
  monkeypatch.setenv("SLURM_NTASKS", "8")
  processes.initialize()
  for name, value in zip(processes._EXPLICIT, ("host:1234", "4", "3")):
    monkeypatch.setenv(name, value)
  processes.initialize()
  told = dict(coordinator_address="host:1234", num_processes=4, process_id=3, cluster_detection_method="deactivate")
  assert joins == [{}, told]


@pytest.mark.parametrize("values", [("host", "4", "3"), ("host:1", "4", ""), ("host:1", "four", "3"), ("", "4", "4")])
def test_incomplete_variables_are_refused(joins, monkeypatch, values):
  for name, value in zip(processes._EXPLICIT, values):
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES=four|needs JAX_COORDINATOR_ADDRESS=HOST:PORT"):
    processes.initialize()
  assert not joins


def test_unreachable_processes_are_one_line(joins, monkeypatch):
  def nobody(**kwargs):
    raise RuntimeError("DEADLINE_EXCEEDED: unreachable")

  monkeypatch.setattr(jax.distributed, "initialize", nobody)
  for name, value in zip(processes._EXPLICIT, ("host:1234", "4", "3")):
    monkeypatch.setenv(name, value)
  with pytest.raises(OSError, match="cannot join the other processes .*unreachable.*JAX_NUM_PROCESSES=1"):
    processes.initialize()


def test_errors_of_process_0_are_raised():
  def act():
    raise OSError("no")

  with pytest.raises(OSError, match="no"):
    processes.run_on_process_0(act)
  assert (
    processes.is_process_0() and processes.true_on_all_processes(True) and not processes.true_on_all_processes(False)
  )
