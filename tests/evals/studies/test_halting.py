"""Token counts against the number of objects."""

import numpy as np
import scipy.stats

from flextok_jax.evals.studies import halting


def test_lengths_by_number_of_objects():
  objects, lengths = np.array([-1, 2, 1, 2, 3, -1]), np.array([9, 4, 1, 6, 7, 9])
  rows = halting.by_objects(objects, lengths)
  assert {k: (n, mean[0]) for k, (n, mean) in rows.items()} == {1: (1, 1.0), 2: (2, 5.0), 3: (1, 7.0)}
  rho, p = halting.rank_correlation(objects, lengths)
  assert (rho, p) == tuple(scipy.stats.spearmanr(objects[1:5], lengths[1:5]))
  assert halting.rank_correlation(objects, np.full(6, 4)) == (None, None)
  assert halting.rank_correlation(np.full(6, -1), lengths) == (None, None)
