"""Class-conditional generator, 1536 x 24: 679M parameters in its blocks."""

from configs import ar


def get_config():
  return ar.get_config("679m")
