"""Random damage to files, to test that readers of files from elsewhere fail with one line or not at all."""

import random
import struct

_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1)


def mutate(data: bytes, rng: random.Random) -> bytes:
  """Returns data after one to four random changes; data itself if it is empty."""
  changed = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    if changed:
      rng.choice(_CHANGES)(changed, rng)
  return bytes(changed)


def _block(data: bytearray, rng: random.Random, largest: int = 4096) -> slice:
  """Draws a part of data; starts and lengths are log-uniform, since headers come first and fields are short."""
  start = min(int(len(data) ** rng.random()) - 1, len(data) - 1) if rng.random() < 0.5 else rng.randrange(len(data))
  return slice(start, start + int(min(len(data) - start, largest) ** rng.random()))


def _flip_bits(data: bytearray, rng: random.Random):
  for _ in range(rng.choice((1, 1, 2, 8, 64))):
    data[_block(data, rng).start] ^= 1 << rng.randrange(8)


def _set_bytes(data: bytearray, rng: random.Random):
  part = _block(data, rng, 16)
  data[part] = rng.choice((rng.randbytes(1), b"\x00", b"\xff")) * (part.stop - part.start)


def _set_number(data: bytearray, rng: random.Random):
  """Writes an integer of 1 to 8 bytes of either byte order: lengths, counts, sizes and offsets."""
  start, size = _block(data, rng).start, rng.choice("BHIQ")
  width = struct.calcsize(size)
  number = rng.choice((*_NUMBERS, len(data), len(data) + 1, rng.getrandbits(64))) % 2 ** (8 * width)
  data[start : start + width] = struct.pack(rng.choice("<>") + size, number)


def _set_digits(data: bytearray, rng: random.Random):
  """Replaces a number in text: sizes in JSON and in headers."""
  digits = [i for i in range(min(len(data), 4096)) if 0x30 <= data[i] <= 0x39]
  if digits:
    number = rng.choice((*_NUMBERS, -1, "1e999", "NaN", "null", '"x"', "[]", "{}", "true", "1.5"))
    data[(i := rng.choice(digits)) : i + 1] = str(number).encode()


def _truncate(data: bytearray, rng: random.Random):
  del data[_block(data, rng).start :]


def _remove(data: bytearray, rng: random.Random):
  del data[_block(data, rng)]


def _repeat(data: bytearray, rng: random.Random):
  part = _block(data, rng)
  data[part.stop : part.stop] = data[part] * rng.choice((1, 2, 16, 256))


def _splice(data: bytearray, rng: random.Random):
  """Copies a part to another place, over what is there or in between."""
  copied, place = bytes(data[_block(data, rng)]), _block(data, rng).start
  data[place : place + rng.choice((0, len(copied)))] = copied


def _insert(data: bytearray, rng: random.Random):
  place = _block(data, rng).start
  data[place:place] = rng.choice(
    (rng.randbytes(rng.randrange(1, 64)), b"\x00" * 64, b"\xed\xa0\x80", b"\r\n", b"[" * 999)
  )


_CHANGES = (
  *(_flip_bits, _flip_bits, _set_bytes, _set_number, _set_number, _set_digits),
  *(_truncate, _remove, _repeat, _splice, _insert),
)
