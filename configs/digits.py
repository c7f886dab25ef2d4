"""A tokenizer that learns in three minutes on two CPU cores: handwritten digits at 16 px, 8 tokens, 2.1M parameters.

The digits are the 1,797 of scikit-learn (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0), which
launch/pictures.py digits writes as a folder of pictures with a subfolder for each class:

  python launch/pictures.py digits DIGITS
  python -m flextok_jax.train --config=digits --data=DIGITS --workdir=DIR

launch/quickstart.sh runs it.
"""

from flextok_jax.configs import shapes


def get_config():
  c = shapes.get_config()
  c.update(
    image_size=16,
    encoder=dict(patch_size=4),
    decoder=dict(modulation="shared"),
    tokens=dict(num_registers=8),
    data=dict(crop="center", flip=False, sources=dict(synthetic=dict(weight=0.0), folder=dict(weight=1.0))),
    optim=dict(warmup_steps=50, ema_decay=0.99),
    train=dict(num_steps=1_000, log_every=50, checkpoint_every=250, eval_every=1_000),
    eval=dict(sources=("folder",), num_images=64),
  )
  return c
