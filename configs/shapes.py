"""A tiny tokenizer to train generators on: plain scenes at 32 px, 16 tokens of 1,000 codes, 2.5M parameters, CPU.

The encoder reads 8x8 px patches (16 of them), the decoder writes 4x4 px patches (64). Two runs: in shapes:coarse nearly
all is noise and the tokens learn the layout; the second starts from its weights. 1,000 codes and not 64,000, because a
generator has to see each of them often enough; all lengths of the prefix are equally frequent, because any of them may
be the one that suffices.

  python -m flextok_jax.train --config=shapes:coarse --workdir=COARSE
  python -m flextok_jax.train --config=shapes --workdir=DIR --config.init_from=COARSE

These two were not run to their end. The shipped weights come from seven runs of the same course, four hours on two CPU
cores (docs/generators.md): 29.0 dB at 16 tokens.

shapes:grid is the 2D baseline of the same size: a token for each of 4 x 4 patches. Its tokens have their places, so it
needs no first run on images that are nearly all noise. It ships; about two hours on two CPU cores (docs/order.md):

  python -m flextok_jax.train --config=shapes:grid --workdir=DIR

shapes:mixed continues the shipped tokenizer on the same scenes at 32, 48, 64 and 96 px, to ask whether larger pictures
need more tokens (experiments/size_and_content.py). Its tables of positions are scaled to every size, so at 32 px it
begins as the shipped one; larger pictures get more noise. A step costs about four times as much as at 32 px:

  python -m flextok_jax.train --config=shapes:mixed --workdir=DIR
"""

from ml_collections import ConfigDict

from flextok_jax import config as common


def get_config(arg: str = ""):
  common.check_argument("shapes", arg, ("", "coarse", "grid", "mixed"))
  c = common.derive(
    image_size=32,
    dtype="float32",  # CPUs gain nothing from bfloat16
    vae=dict(kind="pixels", scaling_factor=1.5),  # brings [-1, 1] RGB to about unit variance
    encoder=dict(width=128, depth=4, patch_size=8),
    decoder=dict(width=128, depth=4, patch_size=4),
    tokens=dict(levels=(8, 5, 5, 5), num_registers=16, nested_dropout="uniform", null_prob=0.1, saturation_weight=0.1),
    # Neighbouring pixels are alike: at t = 0.7 the noised image still shows its layout. With much more noise, the
    # layout has to come from the tokens.
    flow=dict(t_sampling="uniform", t_shift=4.0),
    sampler=dict(num_steps=25, guidance="cfg", guidance_scale=1.5),
    data=dict(
      global_batch=32, num_threads=2, sources=dict(synthetic=dict(weight=1.0, style="plain"), tfds=dict(weight=0.0))
    ),
    # Muon gets past the mean colour in a quarter of AdamW's steps.
    optim=dict(name="muon", learning_rate=3e-3, warmup_steps=300, b2=0.98, ema_decay=0.999),
    train=dict(num_steps=6_000, log_every=50, checkpoint_every=500, keep_period=0, eval_every=3_000),
    eval=dict(sources=("synthetic",), num_images=64, batch_size=64, grid_images=6),
  )
  if arg == "grid":
    c.update(tokens=dict(layout="grid", nested_dropout="none"), decoder=dict(modulation="shared"))
    c.train.update(num_steps=24_000, eval_every=6_000)  # as many as all runs of the ordered one together
  elif arg == "mixed":
    continue_mixed(c, "shapes", num_steps=1_200)
    c.data.sources.synthetic.render_size = 96
  elif arg == "coarse":
    c.update(
      flow=dict(t_shift=20.0),
      optim=dict(end_learning_rate=3e-3),  # constant: the next run continues
      train=dict(num_steps=12_000),
      eval=dict(num_images=24, batch_size=24),
    )
  return c


def continue_mixed(c: ConfigDict, name: str, num_steps: int):
  """Makes a config continue the tokenizer that ships as `name`, at 32, 48, 64 and 96 px."""
  scaled = dict(posemb_scaling="scaled")
  c.update(
    init_from=name,
    encoder=scaled,
    decoder=scaled,
    flow=dict(base_size=c.image_size),  # larger pictures get more noise
    data=dict(shapes=((32, 32), (48, 48), (64, 64), (96, 96)), shape_weights=(1, 1, 1, 1)),
    optim=dict(learning_rate=1e-3, warmup_steps=100),
    train=dict(num_steps=num_steps, eval_every=num_steps),
  )
