"""Endless splits: record i is drawn by a generator that depends on (split, i) alone."""

import numpy as np

LENGTH = 2**31 - 1  # indices of an endless split; more draws than any run sees
SPLIT_KEYS = {"train": 0x7261696E, "validation": 0x76616C69}  # first key word of the generator: separate spaces


def generator(split: str, index: int) -> np.random.Generator:
  """The generator of record index of a split."""
  return np.random.Generator(np.random.Philox(key=[SPLIT_KEYS[split], int(index)]))
