"""Text-conditional generator, 2304 x 36: 3058M parameters in its blocks; reads FLAN-T5-XL's features."""

from configs import ar


def get_config():
  return ar.get_config("3b")
