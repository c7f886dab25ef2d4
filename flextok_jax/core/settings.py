"""Checks of config fields that several commands share."""

import jax.numpy as jnp
from ml_collections import ConfigDict


def at_least_one(config: ConfigDict, *names: str):
  """Raises ValueError for the first dotted field that is not a whole number of at least 1."""
  for name in names:
    value = config
    for part in name.split("."):
      value = value[part]
    if not isinstance(value, int) or value < 1:
      raise ValueError(f"{name} must be at least 1, got {value!r}")


def share(name: str, value: float) -> float:
  """Returns the value of field `name`; ValueError if it is no number from 0 to 1."""
  if not 0 <= value <= 1:  # nan neither
    raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
  return value


def float_dtype(name: str, value: str) -> jnp.dtype:
  """Returns the floating-point type that field `name` names; ValueError if there is none."""
  try:
    dtype = jnp.dtype(value)
  except TypeError:
    dtype = None
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"{name} must be a floating-point type like 'bfloat16' or 'float32', got {value!r}")
  return dtype
