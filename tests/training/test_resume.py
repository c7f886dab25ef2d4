"""Killed processes: a resumed run ends bit-identical to an undisturbed one (on CPU).

One workdir is killed at four points and stopped once by SIGTERM, and rerun each time: if any restart lost or changed a
bit, the result would differ from that of the undisturbed run. Many more random kills: experiments/elastic.py.
"""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from tests.support.commands import shell

STEPS, EVERY = 40, 10
COMMAND = [
  "--config=configs/debug.py",
  f"--config.train.num_steps={STEPS}",
  "--config.train.log_every=1",
  f"--config.train.checkpoint_every={EVERY}",
  "--config.train.keep_checkpoints=9",
  f"--config.train.eval_every={STEPS}",
  "--config.train.export_dtype=float32",
  "--config.optim.name=muon",
  "--config.eval.num_tokens=(4,)",
  "--config.sampler.num_steps=1",
  "--config.sampler.guidance=none",
]  # Adam's moments and Muon's; fmt: skip


def start(workdir, moment=""):
  """Runs the train command on one device, with a signal at `moment` (killed_run.py); returns (code, stdout, stderr)."""
  program = ["tests.support.killed_run", moment] if moment else ["flextok_jax.train"]
  return shell(*program, *COMMAND, f"--workdir={workdir}")


def checkpoint_steps(workdir):
  return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def read_checkpoint(workdir, step):
  items = {name: ocp.args.StandardRestore() for name in ("params", "ema", "opt_state")}
  with ocp.CheckpointManager(workdir / "checkpoints") as manager:
    return manager.restore(step, args=ocp.args.Composite(**items))


def losses(workdir):
  """Returns step -> the losses logged for it by all processes that reached it."""
  seen = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    values = json.loads(line)
    if "loss" in values:
      seen.setdefault(values["step"], []).append(values["loss"])
  return seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed")
  code, _, err = start(workdir, "never")  # it compiles on its own, all others share compiled programs
  assert code == 0, err
  return workdir


def test_killed_runs_end_bit_identical(undisturbed, tmp_path):
  # Before any checkpoint: the rerun starts from the beginning.
  assert start(tmp_path, "logged 4 SIGKILL")[0] == -9
  assert checkpoint_steps(tmp_path) == []
  # Between two checkpoints: seven steps are lost.
  code, out, err = start(tmp_path, "logged 17 SIGKILL")
  assert code == -9 and "resuming" not in out
  assert checkpoint_steps(tmp_path) == [10]
  # While a checkpoint is being written: it is complete or absent.
  code, out, err = start(tmp_path, "saving 20 SIGKILL")
  assert code == -9 and "resuming from step 10" in out
  assert checkpoint_steps(tmp_path) in ([10], [10, 20])
  # SIGTERM saves immediately and is not a failure.
  code, out, err = start(tmp_path, "logged 26 SIGTERM")
  assert code == 0, err
  assert "resuming from step " in out and "stopped by a signal at step 27" in out
  assert checkpoint_steps(tmp_path) == [10, 20, 27] and not (tmp_path / "weights.safetensors").exists()
  # Before the final evaluation, while the last checkpoint may still be being written.
  code, out, err = start(tmp_path, f"evaluating {STEPS} SIGKILL")
  assert code == -9 and "resuming from step 27" in out, err
  assert checkpoint_steps(tmp_path) in ([10, 20, 27, 30], [10, 20, 27, 30, 40])
  code, out, err = start(tmp_path)
  assert code == 0 and "resuming from step" in out, err
  assert checkpoint_steps(tmp_path) == [10, 20, 27, 30, 40]

  expected, actual = read_checkpoint(undisturbed, STEPS), read_checkpoint(tmp_path, STEPS)
  for name in ("params", "ema", "opt_state"):
    leaves, others = jax.tree_util.tree_leaves_with_path(expected[name]), jax.tree.leaves(actual[name])
    assert len(leaves) > 10
    for (path, a), b in zip(leaves, others, strict=True):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))
  weights, others = (load_file(path / "weights.safetensors") for path in (undisturbed, tmp_path))
  assert weights.keys() == others.keys()
  for name in weights:
    np.testing.assert_array_equal(weights[name], others[name])

  # Steps computed two or three times had the same loss each time: same batch, same noise.
  once, often = losses(undisturbed), losses(tmp_path)
  assert sorted(once) == sorted(often) == list(range(1, STEPS + 1))
  assert all(set(often[step]) == set(once[step]) for step in once)
  assert len(often[3]) == 2 and len(often[12]) >= 2 and len(often[27]) == 1


def test_average_and_moments_have_changed(undisturbed):
  """Otherwise the comparison above would mean nothing."""
  early, late = read_checkpoint(undisturbed, EVERY), read_checkpoint(undisturbed, STEPS)
  for name in ("params", "ema", "opt_state"):
    changed = [(np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (early[name], late[name])))]
    assert np.mean(changed) > 0.9
  average, params = late["ema"], late["params"]
  assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (average, params))))


def test_rerunning_a_finished_run_does_nothing(undisturbed):
  before = {p: p.stat().st_mtime_ns for p in sorted(undisturbed.rglob("*")) if p.is_file() and "checkpoints" in p.parts}
  code, out, err = start(undisturbed)
  assert code == 0 and "nothing to do" in out and f"step {STEPS}" in out
  after = {p: p.stat().st_mtime_ns for p in sorted(undisturbed.rglob("*")) if p.is_file() and "checkpoints" in p.parts}
  assert before == after
