"""The byte encoder of captions."""

import jax
import numpy as np
import pytest

from flextok_jax.config import derive
from flextok_jax.models.ar.text import ByteEncoder, ngram_rows
from flextok_jax.stages.ar import make_text_encoder
from tests.support.t5_reference import LENGTHS, kept, some_ids


@pytest.mark.parametrize("ngram_rows", [0, 1000])
def test_byte_encoder(ngram_rows):
  c = dict(encoder="bytes", max_length=14, features=16, depth=3, head_dim=8, ngram_rows=ngram_rows)
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


@pytest.mark.parametrize("length, rows", [(1, 7), (3, 1000), (6, 8192)])
def test_rows_of_ngrams(length, rows):
  """They are FNV-1 and a last mix, as whole numbers state it; those of one n-gram are equal, all are used alike."""

  def row(ngram):
    state = length
    for byte in reversed(ngram):
      state = (state ^ byte) * 0x01000193 % 2**32
    state ^= state >> 15
    return (state * 0x2C1B3C6D % 2**32 >> 8) % rows

  ids = np.random.default_rng(0).integers(0, 257, (50, 200))
  found = np.asarray(jax.jit(lambda ids: ngram_rows(ids, length, rows))(ids.astype(np.int32)))
  for b, t in ((0, 0), (3, length - 1), (49, 199)):
    start = [0] * max(0, length - 1 - t)  # before the text
    assert found[b, t] == row([*start, *ids[b, max(0, t - length + 1) : t + 1].tolist()])
  if length > 1:
    counts = np.bincount(found.ravel(), minlength=rows)
    expected = found.size / rows
    assert abs(counts.var() / expected - 1) < 0.25  # Poisson
