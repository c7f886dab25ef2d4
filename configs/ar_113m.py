"""Text-conditional generator, 768 x 12: 113M parameters in its blocks; reads FLAN-T5-XL's features."""

from configs import ar


def get_config():
  return ar.get_config("113m")
