"""Text-conditional generator, 1152 x 18: 382M parameters in its blocks; reads FLAN-T5-XL's features."""

from configs import ar


def get_config():
  return ar.get_config("382m")
