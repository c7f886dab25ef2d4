"""A tiny model of 256 px images whose step takes less time than loading them: 0.1M parameters.

python -m flextok_jax.benchmark --config=loader --jobs=loader
"""

from flextok_jax.configs import debug


def get_config():
  c = debug.get_config()
  c.update(
    image_size=256,
    encoder=dict(patch_size=32),
    decoder=dict(patch_size=32),
    data=dict(global_batch=32, sources=dict(synthetic=dict(render_size=256))),
  )
  return c
