"""Tar files of samples, as of WebDataset."""

import functools
import io
from pathlib import Path
import tarfile

from PIL import Image


def picture(value: int, form: str = "PNG") -> bytes:
  """Returns a file of a grey picture of 8 x 8 px."""
  buffer = io.BytesIO()
  Image.new("RGB", (8, 8), (value, value, value)).save(buffer, form)
  return buffer.getvalue()


def archive(members, form: int = tarfile.PAX_FORMAT) -> bytes:
  """Returns a tar file of (name, bytes) members, or of tarfile.TarInfo without data."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
    for member in members:
      if isinstance(member, tarfile.TarInfo):
        tar.addfile(member)
      else:
        info = tarfile.TarInfo(member[0])
        info.size = len(member[1])
        tar.addfile(info, io.BytesIO(member[1]))
  return buffer.getvalue()


@functools.cache
def shard(first: int, count: int = 4) -> bytes:
  """Returns a tar file of numbered samples with a picture of that value, a caption and a class."""
  members = []
  for i in range(first, first + count):
    members += [(f"{i:06d}.png", picture(i)), (f"{i:06d}.txt", b"number %d" % i), (f"{i:06d}.cls", b"%d" % (i % 10))]
  return archive(members)


def write_shards(folder: Path, shards: int = 3, count: int = 4) -> str:
  """Writes 00000.tar, ... to a folder and returns the pattern that names them."""
  folder.mkdir(parents=True, exist_ok=True)
  for number in range(shards):
    (folder / f"{number:05d}.tar").write_bytes(shard(number * count, count))
  return f"{folder}/{{00000..{shards - 1:05d}}}.tar"
