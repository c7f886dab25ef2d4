"""Reading records from any source."""

from flextok_jax.data.sources import base, photos, synthetic


def test_records_list_all_their_captions():
  for source in (synthetic.Synthetic("train", 16), photos.Photos("train", 48)):
    record, _ = base.read(source, 3)
    assert record["captions"] == (source[3]["caption"],) == (record["caption"],)
