"""Image shards: what python -m flextok_jax.tokenize --what=images writes and data.sources.arrayrecord reads.

The shards of data/shards/files.py. A record is the MessagePack array [bytes of an image file, label, num_objects,
captions].
"""

import io

from PIL import Image

from flextok_jax.data import transforms
from flextok_jax.data.shards import files as shard_files

WHAT = "images"


def file_bytes(image) -> bytes:
  """Returns the bytes of an open image file, or a drawn picture (as of transforms.to_rgb) as a PNG file.

  Raises:
    One of transforms.DECODE_ERRORS: a file that cannot be decoded.
  """
  if isinstance(image, io.IOBase):
    data = image.read()
    transforms.to_rgb(io.BytesIO(data))
    return data
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else transforms.to_rgb(image)).save(buffer, "PNG")
  return buffer.getvalue()


def pack(record: dict) -> bytes:
  """Returns the bytes of a record: {"data": bytes, "label", "num_objects": int, "captions": list of str}."""
  return shard_files.pack([record["data"]], record)


class Shards(shard_files.ShardFiles):
  """The records of a split at random access: shards[i] -> what pack takes.

  Attributes:
    meta: meta.json as a dict. num_records; copies: 1; class_names: list or None; framed, flip: of the sources.

  Raises:
    FileNotFoundError, ValueError: as ShardFiles.
  """

  WHAT = WHAT
  FIELDS = ("framed", "flip")

  def parse(self, data: bytes) -> dict:
    content, facts = shard_files.unpack(data, "image")
    if len(content) != 1 or not isinstance(content[0], bytes):
      raise ValueError("no image record")
    return {"data": content[0], **facts}
