"""Does a run that is killed at random moments lose anything? Kills a tiny run and compares it with an undisturbed one.

python -m experiments.elastic [KILLS] [--elastic] [--seed=0]

Sends SIGKILL, by default twenty times: during a step, while a checkpoint is saved, during an evaluation, each up to
half a second after it began. After every kill all checkpoints are read. At the end the weights and the loss of every
step are bit-identical to those of a run without interruption. With --elastic every start has another mesh, of 8, 4, 2
devices or 1; then they are equal up to rounding. Takes about ten seconds per kill on an idle core.
"""

import argparse
import json
from pathlib import Path
import random
import subprocess
import sys
import tempfile

import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file

from tests.support import tiny_run
from tests.support.commands import environment
from tests.support.tiny_run import losses, trained

MESHES = [(8, dict(data=-1)), (8, dict(data=1, fsdp=-1)), (4, dict(fsdp=2, tensor=2)), (2, dict(tensor=2)), (1, {})]


def start_run(shards, workdir, cache, num_steps, devices=1, mesh=None, moment=None):
  train = dict(num_steps=num_steps, keep_checkpoints=4)
  run = dict(shards=str(shards), workdir=str(workdir), mesh=mesh, moment=moment, train=train)
  env = environment(devices, JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
  command = [sys.executable, "-m", "tests.support.tiny_run", json.dumps([run])]
  return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def read_checkpoints(workdir) -> list[int]:
  """Reads all arrays of all checkpoints and returns their steps; raises orbax's error if one is incomplete."""
  folders = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
  for folder in folders:
    for item in ("params", "ema", "opt_state"):
      restored = ocp.PyTreeCheckpointer().restore(folder / item)
      assert restored, folder
  return sorted(int(folder.name) for folder in folders)


def main(kills: int, seed: int, elastic: bool):
  draw, num_steps = random.Random(seed), 10 * kills + 10
  draw_mesh = lambda: draw.choice(MESHES) if elastic else ()
  with tempfile.TemporaryDirectory() as root:
    root = Path(root)
    shards, cache, whole, workdir = tiny_run.write_shards(root), root / "cache", root / "whole", root / "killed"
    done = start_run(shards, whole, cache, num_steps)
    assert done.returncode == 0, done.stderr
    reached, kinds = 0, {"step": 1, "save": 2, "evaluate": 3}  # each occurs every so many steps
    for kill in range(kills):
      kind = list(kinds)[kill % len(kinds)]
      step = reached + draw.randint(1, 8)
      step += -step % kinds[kind]
      moment = dict(kind=kind, step=step, delay=draw.choice((0, draw.uniform(0, 0.5))))
      done = start_run(shards, workdir, cache, num_steps, *draw_mesh(), moment=moment)
      assert done.returncode == -9, (moment, done.returncode, done.stdout[-500:], done.stderr)
      steps = read_checkpoints(workdir)
      print(f"kill {kill + 1}: {moment}, readable checkpoints: {steps}", flush=True)
      assert not steps or steps[-1] >= reached
      reached = steps[-1] if steps else 0
    done = start_run(shards, workdir, cache, num_steps, *draw_mesh())
    assert done.returncode == 0, done.stderr
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())
    expected, actual = losses(whole), losses(workdir)
    assert trained(whole) == trained(workdir) == list(range(1, num_steps + 1))
    gap = max(abs(actual[key] / expected[key] - 1) for key in actual)
    weights, others = (load_file(path / "weights.safetensors") for path in (whole, workdir))
    assert weights.keys() == others.keys()
    apart = max(float(np.abs(weights[name] - others[name]).max() / np.abs(weights[name]).max()) for name in weights)
    print(f"{kills} kills, {num_steps} steps: losses differ by {gap:.1e}, weights by {apart:.1e} of the largest")
    most = 1e-3 if elastic else 0
    assert gap <= most and apart <= most


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("kills", type=int, nargs="?", default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--elastic", action="store_true")
  main(**vars(parser.parse_args()))
