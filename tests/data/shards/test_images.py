"""Image files stored in shards."""

import io

import numpy as np
from PIL import Image
import pytest

from flextok_jax.data.pictures import UnreadablePicture
from flextok_jax.data.shards.images import file_bytes


def test_file_bytes():
  picture = Image.new("RGB", (3, 2), (1, 2, 3))
  file = io.BytesIO()
  picture.save(file, "JPEG")
  file.seek(0)
  assert file_bytes(file) == file.getvalue()
  for drawn in (picture, np.asarray(picture)):
    stored = Image.open(io.BytesIO(file_bytes(drawn)))
    assert stored.format == "PNG" and np.array_equal(np.asarray(stored), np.asarray(picture))
  with pytest.raises(UnreadablePicture, match="in none of the formats JPEG, PNG, "):
    file_bytes(io.BytesIO(b"none"))
