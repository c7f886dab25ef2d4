"""The kinds of image sources, by name."""

from typing import Any

from flextok_jax.core.extras import MissingPackageError
from flextok_jax.data.sources import emoji, photos
from flextok_jax.data.sources.arrayrecord import ArrayRecord
from flextok_jax.data.sources.base import Source
from flextok_jax.data.sources.emoji import Emoji
from flextok_jax.data.sources.folder import Folder
from flextok_jax.data.sources.photos import Photos
from flextok_jax.data.sources.synthetic import Synthetic
from flextok_jax.data.sources.tfds import Tfds
from flextok_jax.data.sources.webdataset import WebDataset

SOURCES = {
  "synthetic": Synthetic,
  "emoji": Emoji,
  "photos": Photos,
  "folder": Folder,
  "webdataset": WebDataset,
  "tfds": Tfds,
  "arrayrecord": ArrayRecord,
}
SPLITS = ("train", "validation")
OPTIONAL = {"emoji": emoji.check_present, "photos": photos.check_present}  # what they read may be missing


def missing(kind: str, path: str = "") -> str:
  """Returns what a source of OPTIONAL lacks on this machine and how to get it; "" if nothing, or if a path is given."""
  try:
    if not path:
      OPTIONAL[kind]()
  except (FileNotFoundError, MissingPackageError) as error:
    return str(error)
  return ""


def check_kind(kind: str):
  """Raises ValueError for the name of no source."""
  if kind not in SOURCES:
    raise ValueError(f"unknown data source {kind!r}: use one of {', '.join(SOURCES)}")


def make_source(kind: str, split: str, /, **settings: Any) -> Source:
  """Returns a split ("train" or "validation") of a source; settings are the other arguments of its class."""
  if split not in SPLITS:
    raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
  check_kind(kind)
  return SOURCES[kind](split, **settings)
