"""Image shards (data/shards/images.py) as an image source."""

from collections.abc import Callable
import io
from typing import Any

from flextok_jax.data.shards.images import ImageShards
from flextok_jax.data.sources.base import Record, StoredImages, UnreadableRecord, stored_record


class ArrayRecord(StoredImages):
  """Image files in the shards that python -m flextok_jax.tokenize --what=images wrote to path.

  A record has the label, the captions and the split that it had in the source that was written.
  """

  def __init__(self, split: str, path: str):
    if not path:
      raise ValueError(
        "source 'arrayrecord' has no path: set data.sources.arrayrecord.path to a folder that "
        "python -m flextok_jax.tokenize --what=images wrote"
      )
    self._records = ImageShards(path, split)
    meta = self._records.meta
    self.framed, self.flip, self.class_names = meta["framed"], meta["flip"], tuple(meta["class_names"] or ())

  def __len__(self) -> int:
    return len(self._records)

  def view(self, index: int, decode: Callable[[Any], Any], with_captions: bool = True) -> Record:
    try:
      record = self._records[index]
      image = decode(io.BytesIO(record["data"]))
    except (OSError, ValueError) as error:  # also a damaged record
      raise UnreadableRecord(f"{self._records} [{index}]", error) from error
    return stored_record(image, record["label"], tuple(record["captions"]), record["num_objects"])
