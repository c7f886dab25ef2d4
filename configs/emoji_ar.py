"""A tiny generator of emoji on the tokens of configs/emoji.py: by 13 groups, or emoji_ar.py:text by names."""

from configs import shapes_ar


def get_config(arg: str = ""):
  if arg not in ("", "text"):
    raise ValueError(f"configs/emoji_ar.py takes no argument, or 'text', got {arg!r}")
  c = shapes_ar.get_config(arg)
  c.update(ar=dict(num_classes=13))
  return c
