"""Text-conditional generator, 1664 x 26: 1152M parameters in its blocks; reads FLAN-T5-XL's features."""

from configs import ar


def get_config():
  return ar.get_config("1b")
