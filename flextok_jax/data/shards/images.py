"""Image shards: image files, which the source "arrayrecord" (data/sources/arrayrecord.py) reads.

A record is the MessagePack array [bytes of an image file, label, num_objects, captions].
"""

from collections.abc import Iterable, Iterator, Mapping
import io
from typing import Any

from PIL import Image

from flextok_jax.data import transforms
from flextok_jax.data.shards import files
from flextok_jax.data.sources.base import Source


class ImageShards(files.Shards):
  """Image files: shards[i] -> {"data": bytes, "label", "num_objects": int, "captions": list of str}.

  Attributes:
    meta: see files.Shards; also framed and flip of the source that was written. copies is 1.
  """

  WHAT = "images"
  FIELDS = ("framed", "flip")

  @classmethod
  def pack(cls, record: Mapping[str, Any]) -> bytes:
    return files.pack([record["data"]], record)

  def parse(self, data: bytes) -> dict[str, Any]:
    content, facts = files.unpack_bytes(data, self.WHAT)
    return {"data": content, **facts}


class ImageRecords(files.Records):
  """Image files as they are stored, and PNG files of drawn pictures."""

  shards = ImageShards
  image_size = None

  def __init__(self, batch_size: int):
    self.batch_size = batch_size

  def settings(self, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Returns whether the pipeline may crop and mirror; ValueError if the sources differ in that."""
    facts = {name: {"framed": source.framed, "flip": source.flip} for name, source in sources.items()}
    (first, expected), *others = facts.items()
    for name, found in others:
      if found != expected:
        raise ValueError(
          f"{first} and {name} do not mix in image shards, because only one of them may be cropped or mirrored: write "
          "them to separate folders and mix them in training"
        )
    return expected

  def records(self, elements: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    return map(ImageShards.pack, elements)


def file_bytes(image: Any) -> bytes:
  """Returns the bytes of an open image file, or a picture (as of transforms.to_rgb) as a PNG file.

  Raises:
    UnreadablePicture: the file cannot be decoded.
  """
  if isinstance(image, io.IOBase):
    data = image.read()
    transforms.to_rgb(io.BytesIO(data))
    return data
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else transforms.to_rgb(image)).save(buffer, "PNG")
  return buffer.getvalue()
