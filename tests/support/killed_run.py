"""The train command that sends itself a signal at a chosen moment, so the timing does not depend on a clock.

python -m tests.support.killed_run "MOMENT STEP SIGNAL" FLAGS

MOMENT is "logged" (metrics of STEP are written, and all checkpoints before), "saving" (its checkpoint is being written
in the background) or "evaluating" (before its evaluation); "never" sends nothing, and compiles without the cache.
"""

import os
import signal
import sys

import jax

from flextok_jax import cli, train
from flextok_jax.training import checkpoint, loop, writers


def disturb(moment, step, signum):
  """Patches the loop so that it signals itself."""
  send = lambda: os.kill(os.getpid(), getattr(signal, signum))
  write, save, evaluate, last = writers.Writer.write, checkpoint.Checkpoints.save, loop._evaluate, []

  def writing(self, at, *args):
    write(self, at, *args)
    if moment == "logged" and at == step:
      for checkpoints in last:
        checkpoints._manager.wait_until_finished()
      send()

  def saving(self, state, *args, **kwargs):
    last.append(self)
    save(self, state, *args, **kwargs)  # goes on in the background
    if moment == "saving" and int(state.step) == step:
      send()

  def evaluating(evaluation, stage, state, *args):
    if moment == "evaluating" and int(state.step) == step:
      send()
    evaluate(evaluation, stage, state, *args)

  writers.Writer.write, checkpoint.Checkpoints.save, loop._evaluate = writing, saving, evaluating


if __name__ == "__main__":
  given = sys.argv.pop(1)
  if given == "never":
    jax.config.update("jax_enable_compilation_cache", False)
  else:
    name, number, signum = given.split()
    disturb(name, int(number), signum)
  cli.run(train.main)
