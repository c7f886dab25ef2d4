"""Trains in seconds on any machine, to try changes of the code: 16 px, pixel space, 4 tokens, 0.1M parameters.

python -m flextok_jax.train --config=debug --workdir=DIR
"""

from flextok_jax import config as common


def get_config():
  return common.derive(
    image_size=16,
    dtype="float32",
    vae=dict(kind="pixels", scaling_factor=1.5),
    encoder=dict(width=32, depth=1, head_dim=16, patch_size=4),
    decoder=dict(width=32, depth=1, head_dim=16, patch_size=4),
    tokens=dict(num_registers=4),
    sampler=dict(num_steps=3, guidance="cfg", guidance_scale=2.0),
    data=dict(
      global_batch=8, num_threads=2, sources=dict(synthetic=dict(weight=1.0, render_size=32), tfds=dict(weight=0.0))
    ),
    optim=dict(learning_rate=1e-3, warmup_steps=10, ema_decay=0.9),
    train=dict(num_steps=20, log_every=5, checkpoint_every=10, keep_period=0, eval_every=20, tensorboard=False),
    eval=dict(sources=("synthetic",), num_images=4, batch_size=4, grid_images=2),
  )
