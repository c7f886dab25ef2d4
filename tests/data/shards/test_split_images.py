"""Images of a split in a fixed order: centre crops, and augmented copies as in training."""

import dataclasses

import numpy as np
import pytest

from flextok_jax.config import derive
from flextok_jax.data import transforms
from flextok_jax.data.shards.split_images import SplitImages
from flextok_jax.data.sources import registry
from flextok_jax.training.inputs import image_data
from tests.support.pictures import write_damaged_jpegs


def test_images_are_decoded_at_full_size(tmp_path):
  folder = write_damaged_jpegs(tmp_path)
  sources = dict(
    tfds=dict(weight=0.0), folder=dict(weight=1.0, path=str(folder), val_path=str(tmp_path / "validation"))
  )
  data = image_data(derive(data=dict(sources=sources)))
  given = dict(split="train", seed=0, image_size=32, copies=4)
  images = SplitImages(data, **given)
  assert np.array_equal(images[0]["crops"][0], transforms.center_crop(folder / "0.jpg", 32))
  assert "unreadable" in images[3]
  full = SplitImages(dataclasses.replace(data, reduce_jpeg=False), **given)
  assert np.array_equal(images[0]["crops"], full[0]["crops"])


def test_copies_are_flipped_only_if_the_source_allows_it(monkeypatch):
  half = np.zeros((20, 20, 3), np.uint8)
  half[:, :10] = 255

  class Letters(list):
    framed, flip, class_names = True, False, ()

  letters = Letters([{"image": half, "label": 0, "caption": "L", "num_objects": 1}])
  monkeypatch.setattr(registry, "make_source", lambda *args, **settings: letters)
  data = image_data(derive(data=dict(sources=dict(tfds=dict(weight=0.0), folder=dict(weight=1.0)))))
  given = dict(split="train", seed=0, image_size=16)
  with pytest.raises(ValueError, match="nothing augments folder"):
    SplitImages(data, **given, copies=2)
  Letters.flip = True
  crops = SplitImages(data, **given, copies=9)[0]["crops"]
  assert {crop[0, 0, 0] for crop in crops} == {0, 255} and crops[0][0, 0, 0] == 255
