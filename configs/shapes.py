"""A tiny tokenizer to train generators on: plain scenes at 32 px, 16 tokens of 1,000 codes, 2.5M parameters, CPU.

Two runs, as for configs/quickstart.py: in shapes:coarse nearly all is noise and the tokens learn the layout; the second
starts from its weights. 1,000 codes and not 64,000, because a generator has to see each of them often enough; all
lengths of the prefix are equally frequent, because any of them may be the one that suffices.

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

from flextok_jax import config as common
from flextok_jax.configs import quickstart


def get_config(arg: str = ""):
  common.check_argument("shapes", arg, ("", "coarse", "grid", "mixed"))
  c = quickstart.get_config("coarse" if arg == "coarse" else "")
  c.update(
    encoder=dict(depth=4),
    tokens=dict(levels=(8, 5, 5, 5), nested_dropout="uniform"),
    optim=dict(name="muon", learning_rate=3e-3),  # gets past the mean colour in a quarter of AdamW's steps
    data=dict(sources=dict(synthetic=dict(weight=1.0, style="plain"), emoji=dict(weight=0.0), photos=dict(weight=0.0))),
    eval=dict(sources=("synthetic",)),
  )
  if arg == "grid":
    c.update(tokens=dict(layout="grid", nested_dropout="none"), decoder=dict(modulation="shared"))
    c.train.update(num_steps=24_000, eval_every=6_000)  # as many as all runs of the ordered one together
  elif arg == "mixed":
    scaled = dict(posemb_scaling="scaled")
    c.update(
      init_from="shapes",
      encoder=scaled,
      decoder=scaled,
      flow=dict(base_size=32),
      data=dict(
        shapes=((32, 32), (48, 48), (64, 64), (96, 96)),
        shape_weights=(1, 1, 1, 1),
        sources=dict(synthetic=dict(render_size=96)),
      ),
      optim=dict(learning_rate=1e-3, warmup_steps=100),
      train=dict(num_steps=4_000, eval_every=2_000),
    )
  elif arg == "coarse":
    c.optim.end_learning_rate = 3e-3  # constant: the next run continues
    c.train.update(num_steps=12_000, checkpoint_every=500, eval_every=3_000)
  else:
    c.train.update(num_steps=6_000, eval_every=3_000)
  return c
