"""Photographs: disjoint splits and fixed crops."""

import pytest

from flextok_jax.data.sources import photos
from tests.support.pictures import same_record


def test_splits_have_different_photographs():
  train, validation = ({p[:2] for p in table} for table in (photos.TRAIN, photos.VALIDATION))
  assert not train & validation
  seen = [photos.Photos(s, 32) for s in ("train", "validation")]
  labels = [{s[i]["label"] for i in range(60)} for s in seen]
  assert not labels[0] & labels[1]
  assert labels[0] == set(range(len(photos.TRAIN)))


def test_crops():
  source = photos.Photos("train", 48)
  sizes = []
  for i in range(60):
    record = source[i]
    width, height = record["image"].size
    assert width == height >= 48 and record["image"].mode == "RGB"
    sizes.append(width)
    assert same_record(record, source[i])
  assert min(sizes) < 80 and max(sizes) > 200
  with pytest.raises(ValueError, match="min_crop"):
    photos.Photos("train", 0)
