"""A student of a tokenizer's decoder, which decodes in 1 to 8 evaluations without guidance (stage "distill").

  d12_d12, d18_d28    of flextok:d12_d12_in1k and flextok:d18_d28_in1k
  quickstart, shapes  of the tokenizers that ship, on a CPU

The teacher is any tokenizer, a workdir or a weights file. Its encoder and token ids stay the same:

  python -m flextok_jax.train --config=distill:d12_d12 --workdir=DIR --config.init_from=TEACHER

The teacher's paths cost about four times as much as the student's own update. Written once, they serve for many epochs:

  python -m flextok_jax.tokenize --what=trajectories --checkpoint=TEACHER --config=shapes --num_images=40000 --out=PATHS
  python -m flextok_jax.train --config=distill:shapes --workdir=DIR --config.init_from=TEACHER \
      --config.data.trajectories=PATHS

So were the students that ship trained (docs/models.md), on two CPU cores.
"""

from flextok_jax import config as common
from flextok_jax.configs import flextok, quickstart, shapes

MODELS = {
  "d12_d12": lambda: flextok.get_config("d12_d12_in1k"),
  "d18_d28": lambda: flextok.get_config("d18_d28_in1k"),
  "quickstart": quickstart.get_config,
  "shapes": shapes.get_config,
}


def get_config(model: str = ""):
  """Returns the config of the student of one of MODELS."""
  common.check_argument("distill", model, MODELS)
  c = MODELS[model]()
  c.update(
    stage="distill", decoder=dict(interval=True), repa=dict(weight=0.0), sampler=dict(num_steps=4, guidance="none")
  )
  return c
