"""When unreadable pictures stop a command."""

import pytest

from flextok_jax.core import unreadable


@pytest.mark.parametrize("count, seen, share", [(0, 0, 0.0), (1, 3, 0.01), (2, 200, 0.01), (7, 7, 1.0)])
def test_few_stop_nothing(count, seen, share):
  unreadable.check(count, seen, share)


@pytest.mark.parametrize("count, seen, share", [(1, 10**6, 0.0), (2, 3, 0.01), (3, 200, 0.01)])
def test_many_stop_with_the_remedy(count, seen, share):
  message = f"{count} of {seen} images are unreadable, .*data.max_unreadable={share}: a.jpg: .*; remove them, or"
  with pytest.raises(ValueError, match=message):
    unreadable.check(count, seen, share, example="a.jpg: truncated")
