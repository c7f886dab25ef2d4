"""A tiny generator of emoji on the tokens of configs/emoji.py: by their 13 groups, or by their names (emoji_ar:text).

1.1M to 1.5M parameters, CPU. SHARDS are token shards (docs/generators.md):

  python -m flextok_jax.train --config=emoji_ar --workdir=DIR --config.data.tokens=SHARDS --config.train.num_steps=1200
"""

from flextok_jax import config as common
from flextok_jax.configs import shapes_ar


def get_config(arg: str = ""):
  common.check_argument("emoji_ar", arg, ("", "text"))
  c = shapes_ar.get_config(arg)
  c.update(ar=dict(num_classes=13))
  return c
