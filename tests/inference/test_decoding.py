"""Token counts."""

import pytest

from flextok_jax.inference import decoding


def test_token_counts():
  assert decoding.token_counts((), 16) == (1, 2, 4, 8, 16)
  assert decoding.token_counts((), 12) == (1, 2, 4, 8, 12)
  assert decoding.token_counts((), 1) == (1,)
  assert decoding.token_counts((5, 1, 5), 16) == (1, 5)
  for bad in (0, 17, -1):
    with pytest.raises(ValueError, match=f"num_tokens={bad} .* 1 to 16"):
      decoding.token_counts((1, bad), 16)
