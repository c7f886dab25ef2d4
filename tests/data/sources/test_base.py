"""Reading records of any source."""

from flextok_jax.data.sources import base, photos, synthetic


def test_every_record_has_all_its_captions():
  for source in (synthetic.Synthetic("train", 16), photos.Photos("train", 48)):
    record, _ = base.read(source, 3)
    assert record["captions"] == (source[3]["caption"],) == (record["caption"],)
