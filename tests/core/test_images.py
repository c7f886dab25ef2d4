"""Rounding images to 8 bits."""

import jax.numpy as jnp
import numpy as np

from flextok_jax.core import images as images_lib


def test_rounding_matches_saved_pngs():
  levels = np.arange(256, dtype=np.float32)
  np.testing.assert_array_equal(np.round(images_lib.round_to_8bit(jnp.asarray(levels / 127.5 - 1)) * 255), levels)
  np.testing.assert_array_equal(images_lib.round_to_8bit(jnp.asarray([-3.0, 3.0])), [0, 1])
  assert np.isnan(images_lib.round_to_8bit(jnp.asarray([np.nan])))
