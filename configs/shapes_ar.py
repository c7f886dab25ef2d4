"""A tiny generator of plain scenes, by the shape of their largest object, on the tokens of configs/shapes.py.

shapes_ar:text is conditioned on captions, by a byte-level text encoder trained jointly; shapes_ar:stop also ends its
sequences itself, trained on shards with lengths (python -m flextok_jax.tokenize --quality). 1.1M to 1.5M parameters.

  python -m flextok_jax.train --config=shapes_ar --workdir=DIR --config.data.tokens=SHARDS
  python -m flextok_jax.train --config=shapes_ar:stop --workdir=DIR --config.data.tokens=SHARDS \
      --config.train.num_steps=4500

Run on two CPU cores in 9 minutes and in half an hour; both ship. 96% of the images by class and 88% of those by caption
show the shape that was asked for (docs/generators.md).
"""

from flextok_jax import config as common


def get_config(arg: str = ""):
  common.check_argument("shapes_ar", arg, ("", "text", "stop"))
  return common.derive(
    stage="ar",
    dtype="float32",  # CPUs gain nothing from bfloat16
    ar=dict(
      width=128,
      depth=4,
      head_dim=32,
      num_ids=1000,
      num_tokens=16,
      num_classes=16,  # of the source synthetic; plain scenes use 6 of them
      stop=arg == "stop",
      condition="text" if arg else "class",
      guidance_scale=2.0,
      top_p=0.9,
    ),
    text=dict(encoder="bytes", max_length=104, features=64, mlp_hidden=128, depth=2, head_dim=32),
    data=dict(global_batch=64, num_threads=2),
    optim=dict(name="muon", learning_rate=2e-3, warmup_steps=100, b2=0.98, weight_decay=0.05, ema_decay=0.999),
    train=dict(num_steps=3_000, log_every=50, checkpoint_every=500, keep_period=0, eval_every=1_000),
    eval=dict(num_images=1024, batch_size=256),
  )
