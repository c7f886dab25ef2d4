"""Comparing the scores of two evaluations."""

import numpy as np


def assert_same_scores(scores, expected):
  """Asserts that the scores of an evaluation set are equal up to rounding."""
  assert scores["num_images"] == expected["num_images"]
  for part in ("by_tokens", "intervals"):
    assert scores[part].keys() == expected[part].keys()
    for column, values in expected[part].items():
      assert scores[part][column].keys() == values.keys()
      for metric, value in values.items():
        np.testing.assert_allclose(scores[part][column][metric], value, rtol=1e-4, err_msg=f"{column} {metric}")
