"""Opens picture files from anywhere: nothing in a file but its pixels and its orientation has an effect.

Only formats that are plain image codecs are opened, whatever a file's name says: Pillow would run Ghostscript for a
file that starts like an EPS. Metadata is cut out before Pillow sees it, because it parses all of it and fails for what
viewers ignore: large texts and colour profiles in PNG files, tags of the wrong type in EXIF blocks and TIFF files.
"""

from collections.abc import Iterator
import contextlib
import io
import os
import re
import struct
from typing import Any
import warnings
import zlib

from PIL import ExifTags, Image

from flextok_jax.core import files
from flextok_jax.core.errors import first_line
from flextok_jax.core.images import FORMATS

_SIGNED = tuple(name for name in FORMATS if name != "TGA")  # TGA files have no signature: believed by name only
LIMIT = "FLEXTOK_MAX_MEGAPIXELS"  # environment variable
_PILLOW_LIMIT = 2 * 89_478_485  # pixels: above, Image.open raises an error
_BYTES_PER_PIXEL = 16  # of the largest file that is read: four channels of 32 bits, not compressed
_TEXT_BYTES = 2**20  # of a compressed text in which an orientation is searched
_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class UnreadablePicture(ValueError):
  """A picture that cannot be opened or decoded; the message is one line, without the picture's name."""


def max_pixels() -> int:
  """Returns the number of pixels of the largest picture that is decoded: Pillow's limit, or the user's."""
  given = os.environ.get(LIMIT)
  if not given:
    return _PILLOW_LIMIT
  try:
    megapixels = float(given)
  except ValueError:
    megapixels = 0.0
  if not 0 < megapixels < 1e6:
    raise ValueError(f"the environment variable {LIMIT}={given[:80]} must be a number of megapixels, such as 500")
  return int(megapixels * 1e6)


@contextlib.contextmanager
def decoding() -> Iterator[None]:
  """Turns whatever a decoder raises into UnreadablePicture, and ignores its warnings."""
  if warnings.filters[:1] != [_WARNINGS]:  # once; a filter per picture would not be safe between threads
    warnings.filterwarnings("ignore", module=r"PIL\.")
  try:
    yield
  except (UnreadablePicture, KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:  # decoders raise all kinds, also those of other languages
    raise UnreadablePicture(_reason(error)) from error


def _reason(error: BaseException) -> str:
  line = first_line(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)
  return line if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {line}"


def open_picture(file: Any) -> Image.Image:
  """Returns a Pillow image that is not decoded yet, of a path or an open file.

  image.info["orientation"] is its EXIF orientation, 1 to 8.

  Raises:
    UnreadablePicture: no regular file, none of FORMATS, damaged, or larger than max_pixels().
  """
  limit = max_pixels()
  with decoding():
    if isinstance(file, (str, os.PathLike)):
      files.check_regular(file)
      with open(file, "rb") as opened:
        return open_picture(opened)
    data, info = _without_metadata(_read(file, limit * _BYTES_PER_PIXEL))
    name = getattr(file, "name", "")
    by_name = ("TGA",) if isinstance(name, str) and name.lower().endswith(FORMATS["TGA"]) else ()
    if Image.MAX_IMAGE_PIXELS is not None and limit > 2 * Image.MAX_IMAGE_PIXELS:
      Image.MAX_IMAGE_PIXELS = limit  # Pillow's own checks are for the user's limit, too
    try:
      image = Image.open(io.BytesIO(data), formats=_SIGNED + by_name)
      size = image.width * image.height
    except Image.UnidentifiedImageError:
      kind = next((name for name in _SIGNED if (accept := Image.OPEN[name][1]) and accept(data[:16]) is True), None)
      known = f"none of the formats {', '.join(FORMATS)}"
      raise UnreadablePicture(f"a damaged {kind} file" if kind else f"in {known}, or damaged") from None
    except Image.DecompressionBombError as error:
      size = int((re.findall(r"\d+", str(error)) or [limit + 1])[0])
    if size > limit:
      raise UnreadablePicture(
        f"{size / 1e6:.1f} megapixels are more than the limit of {limit / 1e6:.4g}: set the environment variable "
        f"{LIMIT} to read it"
      )
    image.info.update(info)
    image.info["orientation"] = orientation(image)
    return image


def orientation(image: Image.Image) -> int:
  """Returns the orientation of an image by its EXIF block or else its XMP text: 1 to 8; 1 is upright."""
  found: Any = image.info.get("orientation")
  if found is None and isinstance(exif := image.info.get("exif"), bytes):
    found = _exif_orientation(exif)
  if found is None and (xmp := image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")):
    match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp if isinstance(xmp, bytes) else xmp.encode())
    found = match and int(match[1])
  if found is None and "orientation" not in image.info:  # an image that the caller opened or made
    with contextlib.suppress(Exception):
      found = image.getexif().get(ExifTags.Base.Orientation)
  return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _read(file: Any, most: int) -> bytes:
  """Returns the bytes of an open file."""
  if file.seekable():
    size = file.seek(0, io.SEEK_END)
    if size > most:
      raise UnreadablePicture(f"a file of {size / 1e9:.1f} GB: above {most / 1e9:.1f} GB {LIMIT} must be raised")
    file.seek(0)
  data = file.read()
  if not data:
    raise UnreadablePicture("the file is empty")
  return data


def _without_metadata(data: bytes) -> tuple[bytes, dict[str, Any]]:
  """Returns a picture file without metadata, and {"orientation", "exif" or "xmp"} with what says its orientation.

  Files of other formats, and what looks damaged, stay as they are.
  """
  for pattern, clean in _CLEANERS.items():
    if re.match(pattern, data, re.DOTALL):
      info: dict[str, Any] = {}
      with contextlib.suppress(struct.error, IndexError):
        return clean(data, info), info
  return data, {}


def _clean_jpeg(data: bytes, info: dict[str, Any]) -> bytes:
  """Keeps the segments that decoding needs; of the APPn, JFIF and Adobe's, which tell the colour space."""
  kept, at = [data[:2]], 2
  while data[at] == 0xFF and (marker := data[at + 1]) >= 0xC0 and marker != 0xDA and not 0xD0 <= marker <= 0xD9:
    if marker == 0xFF:  # padding
      at += 1
      continue
    end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
    content = data[at + 4 : end]
    if marker not in (*range(0xE1, 0xEE), 0xEF, 0xFE):
      kept.append(data[at:end])
    elif content.startswith(b"Exif\0\0"):
      info.setdefault("exif", content)
    elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
      info.setdefault("xmp", content)
    at = end
  return b"".join([*kept, data[at:]])


def _clean_png(data: bytes, info: dict[str, Any]) -> bytes:
  """Keeps the critical chunks and transparency; of an animation, that is the default image."""
  kept, at = [data[:8]], 8
  while at + 8 <= len(data):
    length, kind = struct.unpack_from(">I4s", data, at)
    if not kind.isalpha():
      kept.append(data[at:])
      break
    end = at + 12 + length
    if kind[:1].isupper() or kind == b"tRNS":
      kept.append(data[at:end])
    else:
      with contextlib.suppress(ValueError, IndexError, zlib.error):
        _read_png_text(kind, data[at + 8 : end - 4], info)
    at = end
  return b"".join(kept)


def _read_png_text(kind: bytes, content: bytes, info: dict[str, Any]):
  """Notes the texts of a PNG file that say its orientation."""
  if kind == b"eXIf":
    info["exif"] = content
  key, _, text = content.partition(b"\0")
  if kind not in (b"tEXt", b"zTXt", b"iTXt") or key not in (b"XML:com.adobe.xmp", b"Raw profile type exif"):
    return
  zipped = kind == b"zTXt" or (kind == b"iTXt" and text[0])
  text = text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[2] if kind == b"iTXt" else text
  if zipped:
    text = zlib.decompressobj().decompress(text, _TEXT_BYTES)
  if key == b"XML:com.adobe.xmp":
    info.setdefault("xmp", text)
  else:  # ImageMagick's: a line with the kind, one with the length, and hexadecimal digits
    info.setdefault("exif", bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode()))


def _clean_tiff(data: bytes, info: dict[str, Any]) -> bytes:
  """Keeps the tags of the first page that decoding needs."""
  order, at, entries = _directory(data)
  info["orientation"] = _exif_orientation(data)
  kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in _TIFF_TAGS]
  big = len(entries[0]) == 20
  block = struct.pack(order + ("Q" if big else "H"), len(kept)) + b"".join(kept) + bytes(8 if big else 4)
  return data[:at] + block + data[at + len(block) :]


def _clean_avif(data: bytes, info: dict[str, Any]) -> bytes:
  """Empties the EXIF block: Pillow rewrites it, with all its tags, if the file turns the picture otherwise."""
  return re.sub(rb"(\0\0(?:II\*\0\x08\0{3}|MM\0\*\0{3}\x08))..", rb"\1\0\0", data, count=1, flags=re.DOTALL)


_CLEANERS = {  # by a pattern of the start of the file
  rb"\xff\xd8\xff": _clean_jpeg,
  rb"\x89PNG\r\n\x1a\n": _clean_png,
  rb"II[*+]\0|MM\0[*+]": _clean_tiff,
  rb".{4}ftyp.{4,64}avi[fs]": _clean_avif,
}
# Sizes, samples, compression, strips and tiles, colours, predictor, and the tables of JPEG compression.
_TIFF_TAGS = {
  *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334, 338, 339),
  *(347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}


def _directory(data: bytes) -> tuple[str, int, list[bytes]]:
  """Returns (byte order, offset, entries) of the first directory of a TIFF file, which an EXIF block is, too."""
  order = "<" if data[:1] == b"I" else ">"
  big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
  (at,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, 8 if big else 4)
  (count,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", data, at)
  first, size = (at + 8, 20) if big else (at + 2, 12)
  entries = [data[i : i + size] for i in range(first, first + size * min(count, 2**16), size) if i + size <= len(data)]
  return order, at, entries


def _exif_orientation(data: bytes) -> int | None:
  """Returns the orientation in an EXIF block or a TIFF file, whatever its other tags hold; None if there is none."""
  with contextlib.suppress(struct.error, IndexError, OverflowError):
    order, _, entries = _directory(re.sub(rb"^(Exif\0\0)+", b"", data[:32]) + data[32:])
    for entry in entries:
      tag, kind = struct.unpack_from(f"{order}HH", entry)
      if tag == ExifTags.Base.Orientation and kind in _INTEGERS:
        return struct.unpack_from(order + _INTEGERS[kind], entry, 12 if len(entry) == 20 else 8)[0]
  return None


_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # types of TIFF
