"""Reading records from any source."""

import pytest

from flextok_jax.data.sources import base, photos, synthetic


def test_records_list_all_their_captions():
  for source in (synthetic.Synthetic("train", 16), photos.Photos("train", 48)):
    record, _ = base.read(source, 3)
    assert record["captions"] == (source[3]["caption"],) == (record["caption"],)


@pytest.mark.parametrize("count", [1, 2, 3, 40, 400])
def test_splits_part_the_keys_and_are_not_empty(count):
  keys = [f"{i}.png" for i in range(count)]
  parts = [base.in_split(keys, split, 5) for split in ("train", "validation")]
  assert [a != b for a, b in zip(*parts)] == [True] * count
  assert count == 1 or min(map(sum, parts)) > 0
  if count == 400:  # by the hash alone, whatever the other keys are
    assert parts[1] == [base.held_out(key, 5) for key in keys]
