"""The tiny tokenizer that ships and that the quickstart trains: 32 px, pixel space, 16 tokens, 2.3M parameters.

Its sizes are what two CPU cores can train: the encoder reads 8x8 px patches (16 of them), the decoder writes 4x4 px
patches (64), so an image costs about 0.5 GFLOP per training step.

The shipped weights come from two runs, 52 minutes on two cores of an AMD EPYC: in the first, quickstart:coarse, nearly
all of the image is noise and the tokens learn to carry the layout; the second starts from its weights. Results:
docs/models.md (16.7 dB on scenes at 16 tokens, 17.9 on emoji, 20.0 on photographs).

  python -m flextok_jax.train --config=quickstart:coarse --workdir=COARSE
  python -m flextok_jax.train --config=quickstart --workdir=DIR --config.init_from=COARSE
"""

from flextok_jax import config as common


def get_config(arg: str = ""):
  common.check_argument("quickstart", arg, ("", "coarse"))
  c = common.derive(
    image_size=32,
    dtype="float32",  # CPUs gain nothing from bfloat16
    vae=dict(kind="pixels", scaling_factor=1.5),  # brings [-1, 1] RGB to about unit variance
    encoder=dict(width=128, depth=3, patch_size=8),
    decoder=dict(width=128, depth=4, patch_size=4),
    tokens=dict(num_registers=16, nested_dropout="pow2", null_prob=0.1, saturation_weight=0.1),
    # Neighbouring pixels are alike: at t = 0.7 the noised image still shows its layout. With much more noise, the
    # layout has to come from the tokens.
    flow=dict(t_sampling="uniform", t_shift=4.0),
    sampler=dict(num_steps=25, guidance="cfg", guidance_scale=1.5),
    data=dict(
      global_batch=32,
      num_threads=2,
      sources=dict(
        synthetic=dict(weight=0.45), emoji=dict(weight=0.4), photos=dict(weight=0.15), tfds=dict(weight=0.0)
      ),
    ),
    optim=dict(learning_rate=1.5e-3, warmup_steps=300, b2=0.98, ema_decay=0.999),
    train=dict(num_steps=5_000, log_every=50, checkpoint_every=500, keep_period=0, eval_every=2_500),
    eval=dict(sources=("synthetic", "emoji", "photos"), num_images=64, batch_size=64, grid_images=6),
  )
  if arg == "coarse":
    c.update(
      flow=dict(t_shift=20.0),
      optim=dict(end_learning_rate=1.5e-3),  # constant: the next run continues
      train=dict(num_steps=2_500, checkpoint_every=250, eval_every=2_500),
      eval=dict(num_images=24, batch_size=24),
    )
  return c
