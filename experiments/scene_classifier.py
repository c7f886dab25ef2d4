"""Trains the network by which the verifier `scenes` judges pictures, on plain scenes alone, and writes it.

python -m experiments.scene_classifier --out=FILE [--steps=3000] [--seed=1]

Its seed and its scenes are others than those of the network of experiments/agreement.py.
"""

from pathlib import Path

from absl import flags
from flax.traverse_util import flatten_dict
import jax
import numpy as np

from experiments.agreement import draw_scenes, learn, make_answer, scenes
from flextok_jax import cli
from flextok_jax.core import tensor_file

FIRST = 10_000_000  # number of its first scene


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("out", None, "The file to write, .safetensors.", flag_values=values)
  flags.DEFINE_integer("steps", 3000, "Training steps of 128 scenes.", flag_values=values)
  flags.DEFINE_integer("seed", 1, "Of the network.", flag_values=values)


def main(values: flags.FlagValues):
  """Trains, reports the share of right answers on held-out scenes, and writes values.out."""
  cli.require(values, "out")
  params = jax.device_get(learn(draw_scenes(32, FIRST), 32, values.steps, values.seed))
  images, said, _ = scenes("validation", FIRST, 1024, 32)
  found = make_answer(params)(images)
  print({k: float((found[k] == v).mean()) for k, v in said.items()})
  arrays = {name: np.asarray(x, np.float16) for name, x in flatten_dict(params, sep="/").items()}
  tensors = {name: (x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()}
  tensor_file.write(Path(values.out), tensors, {}, checksum=True)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
