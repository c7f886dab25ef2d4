"""Crops of the photographs in the scikit-image and scikit-learn wheels, and of a folder; nothing is downloaded."""

import functools
import importlib.util
import os

import numpy as np
from PIL import Image

from flextok_jax.core import extras
from flextok_jax.data import listing, transforms
from flextok_jax.data.sources.base import ENDLESS, Record, generator

# (package, file, caption). Drawings, scanned text and charts in these packages are excluded.
TRAIN = (
  ("skimage", "astronaut.png", "an astronaut in an orange suit before a flag"),
  ("skimage", "brick.png", "a brick wall"),
  ("skimage", "camera.png", "a man with a camera on a tripod"),
  ("skimage", "cell.png", "a cell under the microscope"),
  ("skimage", "clock_motion.png", "a blurred clock"),
  ("skimage", "coins.png", "ancient coins"),
  ("skimage", "grass.png", "grass"),
  ("skimage", "gravel.png", "gravel"),
  ("skimage", "hubble_deep_field.jpg", "galaxies in deep space"),
  ("skimage", "ihc.png", "stained tissue under the microscope"),
  ("skimage", "moon.png", "the surface of the moon"),
  ("skimage", "motorcycle_left.png", "a motorcycle in a garage"),
  ("skimage", "motorcycle_right.png", "a motorcycle in a garage"),
  ("skimage", "retina.jpg", "the retina of an eye"),
  ("sklearn", "china.jpg", "a Chinese palace under a blue sky"),
)
VALIDATION = (
  ("skimage", "chelsea.png", "a tabby cat"),
  ("skimage", "coffee.png", "a cup of coffee with a spoon"),
  ("skimage", "rocket.jpg", "a rocket on its launch pad"),
  ("sklearn", "flower.jpg", "a red dahlia"),
)
# The two everyday scenes in colour without a stereo twin are drawn twice as often as the others.
_OFTEN = ("astronaut.png", "china.jpg")
_FOLDERS = {"skimage": "data", "sklearn": os.path.join("datasets", "images")}
CROPS = 64  # fixed crops per photograph in the validation split


def photo_path(package: str, file: str) -> str:
  """Returns the path of a file in an installed package, without importing the package."""
  spec = importlib.util.find_spec(package)
  folder = os.path.join(os.path.dirname(spec.origin), _FOLDERS[package]) if spec and spec.origin else ""
  path = os.path.join(folder, file)
  if not folder or not os.path.isfile(path):
    raise extras.MissingPackageError(package, "toy", f"the photograph {file}")
  return path


def check_present():
  """Raises MissingPackageError if this machine lacks a photograph."""
  for package, file, _ in TRAIN + VALIDATION:
    photo_path(package, file)


@functools.lru_cache(maxsize=128)
def _pixels(path: str) -> Image.Image:
  return transforms.to_rgb(path)


class Photos:
  """Square crops; the side is drawn log-uniformly from min_crop pixels to the photograph's shorter side.

  train: endless; index i draws a photograph and a crop. validation: CROPS fixed crops per held-out photograph. The
  label is an index into TRAIN + VALIDATION, -1 for photographs of the folder.

  Args:
    split: "train" or "validation".
    min_crop: smallest side of a crop, pixels.
    path: folder with more photographs, in PATH/train and PATH/validation; "": none.

  Raises:
    FileNotFoundError: the folder has no such photographs.
  """

  framed = True  # cropped here
  flip = True
  class_names = ()

  def __init__(self, split: str, min_crop: int, path: str = ""):
    if min_crop < 8:
      raise ValueError(f"photos need min_crop >= 8 pixels, got {min_crop}")
    self._split = split
    self._min_crop = min_crop
    photos = TRAIN if split == "train" else VALIDATION
    first_label = 0 if split == "train" else len(TRAIN)
    self._photos = [
      (photo_path(package, file), first_label + i, caption) for i, (package, file, caption) in enumerate(photos)
    ]
    if split == "train":
      self._photos += [p for p in self._photos if os.path.basename(p[0]) in _OFTEN]
    if path:
      folder = os.path.join(path, split)
      found = listing.scan(folder).files
      self._photos += [(os.path.join(folder, file), -1, os.path.splitext(file)[0]) for file in found]

  def __len__(self) -> int:
    return ENDLESS if self._split == "train" else CROPS * len(self._photos)

  def __getitem__(self, index: int) -> Record:
    rng = generator(self._split, index)
    path, label, caption = self._photos[index % len(self._photos)]
    photo = _pixels(path)
    short = min(photo.size)
    side = int(round(np.exp(rng.uniform(np.log(min(self._min_crop, short)), np.log(short)))))
    left = int(rng.integers(photo.width - side + 1))
    top = int(rng.integers(photo.height - side + 1))
    crop = photo.crop((left, top, left + side, top + side))
    return {"image": crop, "label": label, "caption": caption, "num_objects": -1}
