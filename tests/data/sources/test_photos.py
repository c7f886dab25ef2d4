"""Photographs: disjoint splits and fixed crops."""

from PIL import Image
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


def test_a_folder_adds_photographs(tmp_path):
  for split, color in (("train", "red"), ("validation", "blue")):
    (tmp_path / split).mkdir()
    Image.new("RGB", (90, 60), color).save(tmp_path / split / "plain.png")
  alone, more = photos.Photos("validation", 48), photos.Photos("validation", 48, str(tmp_path))
  assert len(more) - len(alone) == photos.CROPS
  added = more[len(photos.VALIDATION)]
  assert added["caption"] == "plain" and added["label"] == -1
  assert added["image"].getpixel((0, 0)) == (0, 0, 255) and 48 <= added["image"].width <= 60
  assert "plain" in {photos.Photos("train", 48, str(tmp_path))[i]["caption"] for i in range(40)}
  with pytest.raises(FileNotFoundError, match="train does not exist"):
    photos.Photos("train", 48, str(tmp_path / "none"))
