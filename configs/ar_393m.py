"""Class-conditional generator, 1280 x 20: 393M parameters in its blocks."""

from configs import ar


def get_config():
  return ar.get_config("393m")
