"""Class-conditional generator, 1024 x 16: 201M parameters in its blocks."""

from configs import ar


def get_config():
  return ar.get_config("201m")
