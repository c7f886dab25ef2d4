"""Trains any stage: python -m flextok_jax.train --config=NAME --workdir=DIR [--data=FOLDER] [--config.a.b=v].

The same command again, or --workdir=DIR alone, resumes from the newest checkpoint, bit for bit if the devices compute
deterministically.
"""

from collections.abc import Callable

from absl import flags
import jax
from ml_collections import ConfigDict

from flextok_jax import cli
from flextok_jax.config import flatten
from flextok_jax.evals.from_config import make_evaluator, make_measure
from flextok_jax.stages.stage import Stage
from flextok_jax.training import loop

CONFIG = cli.define_config_flag("Experiment: NAME[:ARGUMENT] of a config, or PATH.py[:ARGUMENT].")
cli.define_data_flag()
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of checkpoints, metrics and pictures; made if missing. Of a run: alone, it resumes."
)


def make_evaluation(
  config: ConfigDict, stage: Stage, mesh: jax.sharding.Mesh, prepare: Callable[[dict], dict]
) -> tuple[loop.Evaluation, loop.Measure]:
  """Returns the evaluation that config.eval describes, and what measures the fields that the config leaves open."""
  evaluator = make_evaluator(config, stage, mesh, prepare)
  return evaluator, make_measure(config, stage, mesh, evaluator)


def train(config: ConfigDict, workdir: str) -> None:
  """Trains config.stage in workdir with the evaluation that config.eval describes; see training/loop.py."""
  loop.train(config, workdir, make_evaluation)


def main() -> None:
  config = cli.config_of_run(flags.FLAGS)
  if config is None or not WORKDIR.value:
    raise ValueError("give --config=NAME and --workdir=DIR, or --workdir=DIR of a run to resume it")
  with cli.renamed(**{name: f"config.{name}" for name in flatten(config)}):
    train(config, WORKDIR.value)


if __name__ == "__main__":
  cli.run(main)
