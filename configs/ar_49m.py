"""Class-conditional generator, 640 x 10: 49M parameters in its blocks."""

from configs import ar


def get_config():
  return ar.get_config("49m")
