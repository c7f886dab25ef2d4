"""A student of a tokenizer's decoder, which decodes in 1 to 8 evaluations without guidance (docs/students.md).

  d12_d12, d18_d28    of flextok:d12_d12_in1k and flextok:d18_d28_in1k, at 256 px
  glyphs, shapes      of the tokenizers that ship, at 64 and 32 px, on a CPU, in 1, 2 or 4 steps

The teacher is the tokenizer at init_from, a workdir or a weights file:

  python -m flextok_jax.train --config=distill:d12_d12 --workdir=DIR --config.init_from=TEACHER

Its paths cost more than the student's own update. Stored, they serve for many epochs:

  python -m flextok_jax.tokenize --what=trajectories --checkpoint=TEACHER --config=shapes --num_images=16384 \
      --shards=32 --out=PATHS
  python -m flextok_jax.train --config=distill:shapes --workdir=DIR --config.init_from=TEACHER \
      --config.data.trajectories=PATHS

distill:shapes was run so on two CPU cores, 20 minutes for the paths and an hour for the training, and distill:glyphs
with 12,288 paths and 1,200 steps, 20 minutes and half an hour. Both ship. The others were not trained.
"""

from flextok_jax import config as common
from flextok_jax.configs import flextok, glyphs, shapes

MODELS = {
  "d12_d12": lambda: flextok.get_config("d12_d12_in1k"),
  "d18_d28": lambda: flextok.get_config("d18_d28_in1k"),
  "glyphs": glyphs.get_config,
  "shapes": shapes.get_config,
}


def get_config(model: str = ""):
  """Returns the config of a student of one of MODELS."""
  common.check_argument("distill", model, MODELS)
  c = MODELS[model]()
  c.update(
    stage="distill", decoder=dict(interval=True), repa=dict(weight=0.0), sampler=dict(num_steps=4, guidance="none")
  )
  steps = {"glyphs": 1_200, "shapes": 2_500}.get(model)
  if steps:
    c.update(
      distill=dict(steps=(1, 2, 4)),
      optim=dict(name="muon", learning_rate=2e-3, warmup_steps=50, ema_decay=0.998),
      train=dict(num_steps=steps, checkpoint_every=200, eval_every=steps),
    )
  return c
