"""The files in a tar archive and where they lie, so that they can be read at random access."""

from collections.abc import Iterator
import os
import re

BLOCK = 512
_LONGEST_NAME = 2**16  # bytes; of names that have an entry of their own
_LONGEST_PAX = 2**20
_LONGEST_PADDING = 2**20  # zeros within an archive, or at its end
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_FILES = b"0\x007"  # types of entries: regular files
_LINKS, _FOLDER = b"12346", b"5"  # links, devices and FIFOs; entries without data


class Damage(Exception):
  """An archive that cannot be read beyond some entry."""


def entries(file: int, size: int) -> Iterator[tuple[str, int, int]]:
  """Yields (name, first byte, number of bytes) of the files of an archive in their order; -1 bytes: a link or device.

  Only headers are read, so this takes the same time for files of any size. Formats are ustar, GNU and pax. Archives
  that were joined by cat are read to the end.

  Args:
    file: descriptor of the archive.
    size: its bytes.

  Raises:
    Damage: a header is damaged, a file is incomplete, or the archive is none.
  """
  start = os.pread(file, 8, 0)
  for mark, what in _COMPRESSED.items():
    if start.startswith(mark):
      raise Damage(f"is compressed by {what}, without random access: decompress it")
  position, name, length, ended = 0, None, None, False
  while position < size:
    header = os.pread(file, BLOCK, position)
    if len(header) < BLOCK:
      raise Damage(f"ends within a header, at byte {position}")
    if not any(header):
      position, ended = _after_padding(file, position, size), True
      continue
    ended = False
    kind, count = _parse(header, position)
    begin = position + BLOCK
    if kind in b"LK" and count <= _LONGEST_NAME:
      data = os.pread(file, count, begin)
      name = _text(data) if kind == b"L" else name
    elif kind == b"x" and count <= _LONGEST_PAX:
      fields = _pax(os.pread(file, count, begin))
      name = _text(fields["path"]) if "path" in fields else name
      length = _number(fields["size"], 10, position) if "size" in fields else None
    elif kind in b"LKxS":
      raise Damage(f"has {'a sparse file' if kind == b'S' else 'a name that is too long'}, at byte {position}")
    else:
      count = count if length is None else length
      count = 0 if kind in _LINKS + _FOLDER else count
      if begin + count > size:
        raise Damage(f"ends within a file of {count} bytes, at byte {position}")
      found = _name(header) if name is None else name
      if kind in _FILES and not found.endswith("/"):
        yield found, begin, count
      elif kind in _LINKS:
        yield found, begin, -1
      name = length = None
    position = begin + -(-count // BLOCK) * BLOCK
  if not ended:
    raise Damage("has no mark of its end, so it may be incomplete" if size else "is empty")


def name_before(file: int, begin: int) -> str:
  """Returns the name of the file that begins at a byte, as far as its header has it."""
  return _name(os.pread(file, BLOCK, begin - BLOCK))


def _parse(header: bytes, position: int) -> tuple[bytes, int]:
  """Returns the type and the size of an entry."""
  if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156], 8, position):
    raise Damage(f"has a damaged header, at byte {position}" if position else "is no tar archive")
  field = header[124:136]
  size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _number(field, 8, position)
  return header[156:157], size


def _number(text: bytes, base: int, position: int) -> int:
  digits = text.strip(b" \0")
  if not re.fullmatch(rb"[0-7]{0,12}" if base == 8 else rb"[0-9]{1,20}", digits):
    raise Damage(f"has a damaged header, at byte {position}" if position else "is no tar archive")
  return int(digits or b"0", base)


def _name(header: bytes) -> str:
  name, prefix = _text(header[:100]), _text(header[345:500])
  return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(data: bytes) -> str:
  return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, bytes]:
  """Parses records "LENGTH KEY=VALUE\\n"; what follows a damaged one is ignored."""
  fields, position = {}, 0
  while found := re.compile(rb"([0-9]{1,9}) ([^=]+)=").match(data, position):
    end = position + int(found[1])
    if end <= found.end() or end > len(data):
      break
    fields[found[2].decode(errors="replace")] = data[found.end() : end - 1]
    position = end
  return fields


def _after_padding(file: int, position: int, size: int) -> int:
  """Returns where the entries continue after zeros: in archives that were joined; else the size."""
  zeros = os.pread(file, _LONGEST_PADDING, position)
  used = next((i for i in range(0, len(zeros), BLOCK) if any(zeros[i : i + BLOCK])), None)
  if used is not None:
    return position + used
  if position + len(zeros) < size:
    raise Damage(f"has {size - position} bytes after its end, at byte {position}, which begin with zeros")
  return size
