"""Folders of pictures, and comparison of source records."""

from pathlib import Path

import numpy as np
from PIL import Image

from flextok_jax.data import transforms
from flextok_jax.data.sources import photos


def same_record(a: dict, b: dict) -> bool:
  """Whether two records of a source are equal."""
  return np.array_equal(np.asarray(a["image"]), np.asarray(b["image"])) and all(
    a[k] == b[k] for k in ("label", "caption", "num_objects")
  )


def write_classes(root: Path, count=4, size=(40, 30), classes=("bird", "tree_frog")) -> Path:
  """Writes `count` single-colour pictures per class and returns root."""
  for c, name in enumerate(classes):
    (root / name).mkdir(parents=True)
    for i in range(count):
      Image.new("RGB", size, (20 * i, 100 * c, 50)).save(root / name / f"{i}.png")
  return root


def write_jpegs(folder: Path, count: int) -> Path:
  """Writes photographs of 400 x 300 px to folder/0.jpg, folder/1.jpg, ... and returns folder."""
  folder.mkdir(parents=True)
  photograph = transforms.to_rgb(photos.photo_path("skimage", "astronaut.png"))
  for i in range(count):
    photograph.crop((4 * i, 0, 400 + 4 * i, 300)).save(folder / f"{i}.jpg", quality=95)
  return folder


def write_damaged_jpegs(root: Path) -> Path:
  """Writes eight photographs to root/train, with 3.jpg truncated and 6.jpg damaged, and one to root/validation."""
  path = write_jpegs(root / "train", 8)
  whole = (path / "3.jpg").read_bytes()
  (path / "3.jpg").write_bytes(whole[: len(whole) // 2])
  (path / "6.jpg").write_bytes(whole[:2] + b"\x00" * 500)
  write_jpegs(root / "validation", 1)
  return path
