"""A tiny tokenizer to generate on: plain scenes at 32 px, 16 tokens of 1,000 codes.

As configs/quickstart.py, in two runs: shapes.py:coarse, where nearly all is noise and the tokens learn the layout, then
shapes.py from its weights. 1,000 codes rather than 64,000, as a generator has to see each of them often enough, and all
lengths of the prefix alike, as any of them may be the one that suffices.
"""

from configs import quickstart


def get_config(arg: str = ""):
  if arg not in ("", "coarse"):
    raise ValueError(f"configs/shapes.py takes no argument, or 'coarse', got {arg!r}")
  c = quickstart.get_config(arg)
  c.update(
    encoder=dict(depth=4),
    tokens=dict(levels=(8, 5, 5, 5), nested_dropout="uniform"),
    optim=dict(name="muon", learning_rate=3e-3),  # leaves the mean colour behind after a quarter of AdamW's images
    data=dict(sources=dict(synthetic=dict(weight=1.0, style="plain"), emoji=dict(weight=0.0), photos=dict(weight=0.0))),
    eval=dict(sources=("synthetic",)),
  )
  if arg:
    c.optim.end_learning_rate = 3e-3  # constant: the next run goes on
    c.train.update(num_steps=12_000, checkpoint_every=500, eval_every=3_000)
  else:
    c.train.update(num_steps=6_000, eval_every=3_000)
  return c
