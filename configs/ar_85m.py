"""Class-conditional generator, 768 x 12: 85M parameters in its blocks."""

from configs import ar


def get_config():
  return ar.get_config("85m")
