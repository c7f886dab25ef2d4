"""The byte encoder of captions."""

import jax
import numpy as np
import pytest

from flextok_jax.config import derive
from flextok_jax.models.ar.text import ByteEncoder
from flextok_jax.stages.ar import make_text_encoder
from tests.support.t5_reference import LENGTHS, kept, some_ids


def test_byte_encoder():
  c = dict(encoder="bytes", max_length=14, features=16, depth=3, head_dim=8)
  encoder = make_text_encoder(derive(stage="ar", dtype="float32", text=c))
  assert isinstance(encoder, ByteEncoder)
  ids = some_ids(257)
  params = jax.jit(encoder.init)(jax.random.key(0), ids, LENGTHS)
  run = jax.jit(encoder.apply)
  one = kept(run(params, ids, LENGTHS))
  assert one.shape == (LENGTHS.sum(), 16)
  np.testing.assert_allclose(one.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(one.std(-1), 1, atol=1e-3)
  other = np.where(np.arange(14) < LENGTHS[:, None], ids, 256 - ids)
  np.testing.assert_array_equal(kept(run(params, other, LENGTHS)), one)
  np.testing.assert_allclose(kept(run(params, ids[:, :5], np.minimum(LENGTHS, 5)), LENGTHS)[-6:], one[-6:], atol=1e-5)
  # The bytes of a text affect its features, and so does their order.
  for changed in (np.where(np.arange(14) == 4, 300 - ids, ids) % 257, ids[:, [1, 0, *range(2, 14)]]):
    assert np.abs(kept(run(params, changed, LENGTHS))[: LENGTHS[0]] - one[: LENGTHS[0]]).min(0).max() > 1e-4
  with pytest.raises(ValueError, match="a text of 15 bytes"):
    encoder.init(jax.random.key(0), some_ids(257, 15), LENGTHS)
