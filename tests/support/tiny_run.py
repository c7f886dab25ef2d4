"""A tiny run for starting, killing and resuming as processes: a generator on token shards, which compiles fastest.

python -m tests.support.tiny_run RUNS

RUNS is a JSON list of jobs, executed in order: a training {"workdir", "shards"} with the optional config
sections "mesh" and "train", or an evaluation of a {"checkpoint"}. A training with "moment" {"kind", "step", "process",
"name", "delay"} is disturbed: that process gets the signal `name` `delay` seconds after it starts the step ("step"),
saving its checkpoint ("save") or its evaluation ("evaluate"), so the timing does not depend on a clock.
"""

import contextlib
import json
import os
import signal
import threading
import time
from unittest import mock

import jax

from flextok_jax import cli, train
from flextok_jax.config import derive
from flextok_jax.evals import from_config
from flextok_jax.parallel import processes, sharding
from flextok_jax.training import checkpoint, loop
from flextok_jax.weights import loading
from tests.support import token_shards

STEPS = 12


def write_shards(root):
  """Writes token shards for config_of under root and returns their folder."""
  pictures = token_shards.make_pictures(root / "pictures")
  for split in ("train", "validation"):
    token_shards.write(root / "shards", token_shards.config(pictures), split=split, num_shards=1)
  return root / "shards"


def config_of(shards, mesh=None, **train_settings):
  """Returns the config: twelve steps, a checkpoint every second step, an evaluation every third."""
  settings = dict(
    num_steps=STEPS,
    log_every=1,
    checkpoint_every=2,
    eval_every=3,
    keep_checkpoints=3,
    keep_period=0,
    tensorboard=False,
    export_dtype="float32",
  )
  ar = dict(width=32, depth=2, head_dim=16, num_ids=token_shards.IDS, num_tokens=token_shards.TOKENS, num_classes=3)
  return derive(
    stage="ar",
    dtype="float32",
    ar=ar,
    train=settings | train_settings,
    mesh=mesh or {},
    data=dict(tokens=str(shards), global_batch=8, num_threads=1, prefetch=1),
    optim=dict(learning_rate=1e-2, warmup_steps=2, ema_decay=0.9),
    eval=dict(num_images=7, batch_size=8),
  )


@contextlib.contextmanager
def disturbed(kind: str, step: int, process: int = 0, name: str = "SIGKILL", delay: float = 0.0):
  """Makes the process signal itself at the given moment of the run that is trained inside this context."""

  def reached(here: str, at: int):
    if (here, at, jax.process_index()) == (kind, step, process):
      send = lambda: os.kill(os.getpid(), getattr(signal, name))
      threading.Timer(delay, send).start() if delay else send()

  evaluate_state, save, preemption = loop._evaluate, checkpoint.Checkpoints.save, processes.preemption

  def evaluating(evaluation, stage, state, *args):
    reached("evaluate", int(state.step))
    evaluate_state(evaluation, stage, state, *args)

  def saving(self, state, *args, **kwargs):
    save(self, state, *args, **kwargs)  # continues in the background
    reached("save", int(state.step))

  @contextlib.contextmanager
  def watched():
    with preemption() as preempted:

      def ask(at):
        reached("step", at)
        if name == "SIGTERM" and at > step:
          time.sleep(1)  # the other processes may learn of it this much later, without making the run longer
        return preempted(at)

      yield ask

  with (
    mock.patch.object(loop, "_evaluate", evaluating),
    mock.patch.object(checkpoint.Checkpoints, "save", saving),
    mock.patch.object(processes, "preemption", watched),
  ):
    yield


def losses(workdir):
  """Returns (step, name) -> training or evaluation loss; for repeated steps the last one."""
  seen = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    values = json.loads(line)
    name = "loss" if "loss" in values else "eval/loss"
    seen[values["step"], name] = values[name]
  return seen


def trained(workdir):
  """Returns the trained steps. Evaluations are excluded: one interrupted by a signal is not repeated."""
  return sorted(step for step, name in losses(workdir) if name == "loss")


def main(text: str):
  sharding.SMALL = 1024  # otherwise nothing this small would be sharded
  for run in json.loads(text):
    if "checkpoint" in run:
      report = from_config.evaluate(*loading.load(run["checkpoint"], mesh=sharding.make_mesh()))
      processes.log_on_process_0(json.dumps({"evaluated": report.scores["loss"]}))
      continue
    with disturbed(**run["moment"]) if run.get("moment") else contextlib.nullcontext():
      train.train(config_of(run["shards"], run.get("mesh"), **run.get("train", {})), run["workdir"])


if __name__ == "__main__":
  cli.run(main, ["RUNS"])
