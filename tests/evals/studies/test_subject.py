"""Decoding the subject of a study."""

import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.evals.studies import subject
from flextok_jax.inference import decoding
from flextok_jax.parallel import sharding


def test_non_finite_images_are_refused():
  detokenize = lambda value, ids, keep_k, keys: jnp.where(keep_k == 2, value, 0.0)[:, None, None, None]
  by_image = decoding.decoder_by_image(detokenize, 0)
  decode = lambda value: subject.make_decode(by_image, np.float32(value), 4, 3, sharding.make_mesh())(
    np.zeros((4, 3), int), np.array([3, 3, 2, 1]), np.arange(4)
  )
  np.testing.assert_array_equal(decode(1.0)[:, 0, 0, 0], [128, 128, 255, 128])
  with pytest.raises(ValueError, match="not finite: these weights diverged"):
    decode(np.nan)
