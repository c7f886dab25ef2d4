"""Class-conditional generator, 1920 x 30: 1327M parameters in its blocks."""

from configs import ar


def get_config():
  return ar.get_config("1b3")
