"""A tiny tokenizer of emoji to generate on: configs/shapes.py, on the other source."""

from configs import shapes


def get_config(arg: str = ""):
  c = shapes.get_config(arg)
  c.update(data=dict(sources=dict(synthetic=dict(weight=0.0), emoji=dict(weight=1.0))), eval=dict(sources=("emoji",)))
  return c
