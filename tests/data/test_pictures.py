"""Picture files from anywhere are read as a viewer shows them, or are refused with one line."""

import io
import os
import random
import re
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin
import pytest

from flextok_jax.data import pictures, transforms
from flextok_jax.data.pictures import UnreadablePicture
from tests.support.mutations import mutate
from tests.support.pictures import encode, samples

SQUARES = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8))  # [32, 48]


def rgb(data: bytes) -> np.ndarray:
  return np.asarray(transforms.to_rgb(io.BytesIO(data)))


def refused(data: bytes, pattern: str):
  with pytest.raises(UnreadablePicture, match=pattern) as caught:
    rgb(data)
  assert len(str(caught.value).splitlines()) == 1


def exif(*entries: tuple, order: str = ">") -> bytes:
  """Returns an EXIF block of (tag, type, count, 4 bytes of value) after the orientation 6."""
  rows = [struct.pack(order + "HHI4s", *entry) for entry in entries]
  rows.insert(1, struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0))
  head = b"MM\0*\0\0\0\x08" if order == ">" else b"II*\0\x08\0\0\0"
  return b"Exif\0\0" + head + struct.pack(order + "H", len(rows)) + b"".join(rows) + bytes(12)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
  "entry",
  [
    (0x011A, 5, 1, b"\0\0\0\0"),  # a rational that points to the header
    (0x011A, 10, 1, b"\0\0\0\x08"),  # a signed rational, and a negative one below
    (0x0100, 2, 4, b"abc\0"),  # text under the tag of the width
    (0x8769, 2, 4, b"abc\0"),  # text in place of the offset of a directory
    (0x010F, 2, 2**32 - 1, b"\0\0\0\0"),  # 4 GB of text
    (0x0131, 99, 1, b"abcd"),  # an unknown type
  ],
)
def test_orientation_counts_whatever_the_other_tags_hold(kind, entry):
  upright = Image.fromarray(SQUARES).convert("RGB")
  for order in "><":
    block = exif((0x010E, 2, 1, bytes(4)), entry, order=order)
    data = encode(upright, kind, exif=block, **({} if kind == "PNG" else {"quality": 95}))
    turned = upright.transpose(Image.Transpose.ROTATE_270)
    found = rgb(data)
    assert found.shape == (48, 32, 3) and np.abs(found.astype(int) - np.asarray(turned)).max() < 30
    for reduce in (False, True):
      crop = transforms.center_crop(io.BytesIO(data), 16, reduce)
      assert np.abs(crop.astype(int) - transforms.center_crop(turned, 16)).max() < 30


def test_tags_of_an_avif_file_have_no_effect():
  """Its own orientation counts; Pillow writes an EXIF block again if that differs."""
  upright, block = Image.fromarray(SQUARES).convert("RGB"), Image.Exif()
  block[0x0112], block[0x010F] = 6, "maker"
  data = encode(upright, "AVIF", exif=block, quality=95)
  for kind in range(1, 14):
    bent = data.replace(b"\x01\x0f\0\x02", bytes([1, 15, 0, kind])).replace(b"\x0f\x01\x02\0", bytes([15, 1, kind, 0]))
    assert kind == 2 or bent != data
    found = rgb(bent).astype(int)
    assert np.abs(found - np.asarray(upright.transpose(Image.Transpose.ROTATE_270))).max() < 30


@pytest.mark.parametrize("big", [False, True])
def test_tags_of_a_tiff_file_that_decoding_does_not_need_have_no_effect(big):
  tags = TiffImagePlugin.ImageFileDirectory_v2()
  tags[0x0112], tags[0x010E] = 6, "a text"
  tags[0x0128], tags[0x011A] = 3, "no number"  # a resolution in centimetres that is text
  tags.tagtype[0x011A] = 2
  for compression in (None, "tiff_lzw"):
    data = encode(Image.fromarray(SQUARES), "TIFF", tiffinfo=tags, compression=compression, big_tiff=big)
    assert np.array_equal(rgb(data)[..., 0], np.rot90(SQUARES, -1)), compression


def test_orientation_in_texts():
  text = PngImagePlugin.PngInfo()
  text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>', zip=True)
  assert np.array_equal(rgb(encode(Image.fromarray(SQUARES), pnginfo=text))[..., 0], np.rot90(SQUARES))
  block, text = exif()[6:], PngImagePlugin.PngInfo()  # as ImageMagick writes it
  text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
  assert np.array_equal(rgb(encode(Image.fromarray(SQUARES), pnginfo=text))[..., 0], np.rot90(SQUARES, -1))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"tIME", b"qQqq"])
def test_large_and_damaged_chunks_of_a_png_have_no_effect(kind, place):
  start = {b"iTXt": b"text\0\1\0\0\0", b"tEXt": b"text\0"}.get(kind, b"text\0\0")
  content = start + (b"x" * 2**16 if kind == b"tEXt" else zlib.compress(bytes(2**21)))
  chunk = struct.pack(">I", len(content)) + kind + content
  for check in (zlib.crc32(kind + content), 7):
    whole = encode(Image.fromarray(SQUARES))
    at = 33 if place == "before" else len(whole) - 12
    data = whole[:at] + 70 * (chunk + struct.pack(">I", check)) + whole[at:]
    assert np.array_equal(rgb(data)[..., 0], SQUARES)


def test_every_format_is_read():
  for name, data in samples().items():
    image = rgb(data)
    assert image.ndim == 3 and image.dtype == np.uint8 and image.std() > 5, (name, image.std())


@pytest.mark.parametrize(
  "values,expected",
  [
    ([0.0, 0.5, 1.0], [0, 128, 255]),
    ([-0.05, 0.5, 1.05], [0, 128, 255]),  # an overshoot of resampling
    ([0.0, 51.0, 255.0], [0, 51, 255]),
    ([0.0, 257.0, 65535.0], [0, 1, 255]),
    ([-100.0, 0.0, 300.0], [0, 64, 255]),  # elevations
    ([np.nan, 255.0, np.inf], [0, 255, 255]),
  ],
)
def test_grey_of_floating_point_is_scaled_by_its_range(values, expected):
  assert rgb(encode(Image.fromarray(np.array([values], np.float32)), "TIFF"))[0, :, 0].tolist() == expected


def test_grey_of_32_bits_is_scaled_by_its_range():
  for values, expected in (([0, 257, 65535], [0, 1, 255]), ([0, 2**30, 2**31 - 1], [0, 128, 255])):
    assert rgb(encode(Image.fromarray(np.array([values], np.int32)), "TIFF"))[0, :, 0].tolist() == expected


def test_grey_of_16_bits_takes_little_memory(monkeypatch):
  """Blocks of rows are converted, and have the values of the whole."""
  grey = Image.fromarray((np.arange(60 * 50) * 21).astype(np.uint16).reshape(60, 50))
  alpha = Image.merge("LA", (Image.fromarray(SQUARES), Image.fromarray(SQUARES.T.reshape(32, 48))))
  whole, sizes, convert = [rgb(encode(image)) for image in (grey, alpha)], [], transforms._to_8_bits
  monkeypatch.setattr(transforms, "_BLOCK", 350)
  monkeypatch.setattr(transforms, "_to_8_bits", lambda x, *args: sizes.append(x.size) or convert(x, *args))
  assert all(np.array_equal(a, rgb(encode(image))) for a, image in zip(whole, (grey, alpha), strict=True))
  assert len(sizes) == 9 and max(sizes) == 350


def test_large_pictures(monkeypatch):
  png = encode(Image.new("1", (20_000, 10_000)))  # 25 kB
  refused(png, r"200.0 megapixels are more than the limit of 179: set the environment variable FLEXTOK_MAX_MEGAPIXELS")
  for bad in ("x", "nan", "0", "-1", "1e9"):
    monkeypatch.setenv(pictures.LIMIT, bad)
    with pytest.raises(ValueError, match=f"{pictures.LIMIT}={bad} must be a number of megapixels"):
      rgb(encode(Image.new("L", (2, 2))))
  monkeypatch.setenv(pictures.LIMIT, "0.001")
  refused(encode(Image.new("L", (40, 30))), "0.0 megapixels are more than the limit of 0.001")
  monkeypatch.setenv(pictures.LIMIT, "201")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
  assert pictures.open_picture(io.BytesIO(png)).size == (20_000, 10_000)


def test_warnings_are_not_errors():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert pictures.open_picture(io.BytesIO(encode(Image.new("1", (10_000, 10_000))))).size == (10_000, 10_000)
    palette = Image.fromarray(SQUARES).quantize(4)
    assert rgb(encode(palette, transparency=bytes(range(4)))).shape == (32, 48, 3)


def test_only_image_codecs_are_opened(monkeypatch, tmp_path):
  """Whatever its name, an EPS starts no program, and no file of a format without a signature is guessed."""
  monkeypatch.setattr("subprocess.Popen", None)
  eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
  refused(eps, "in none of the formats JPEG, PNG, ")
  (tmp_path / "photo.png").write_bytes(eps)
  with pytest.raises(UnreadablePicture, match="in none of the formats"):
    transforms.center_crop(tmp_path / "photo.png", 8)
  tga = encode(Image.fromarray(SQUARES), "TGA")
  refused(tga, "in none of the formats")
  (tmp_path / "photo.tga").write_bytes(tga)
  assert np.array_equal(np.asarray(transforms.to_rgb(tmp_path / "photo.tga"))[..., 0], SQUARES)


@pytest.mark.parametrize(
  "error", [RuntimeError("a\nb"), MemoryError(), AssertionError(), TypeError("x"), RecursionError()]
)
def test_any_error_of_a_decoder_is_that_pictures(monkeypatch, error):
  class Panic(BaseException):
    """As of decoders in Rust."""

  for raised in (error, Panic("x")):

    def load(self, raised=raised):
      raise raised

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    refused(encode(Image.new("L", (4, 4))), type(raised).__name__)
  monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
  with pytest.raises(KeyboardInterrupt):
    rgb(encode(Image.new("L", (4, 4))))


def test_pictures_without_pixels():
  for empty in (Image.new("RGB", (0, 5)), Image.new("L", (5, 0)), np.zeros((0, 4, 3), np.uint8)):
    for read in (transforms.to_rgb, lambda image: transforms.center_crop(image, 8)):
      with pytest.raises(ValueError, match=r"no pixels: |got \[0, 4, 3\]"):
        read(empty)
  refused(b"", "the file is empty")
  refused(encode(Image.new("L", (4, 4)))[:40], "^(Truncated File Read|a damaged PNG file)$")


def test_files_that_are_not_regular(tmp_path):
  os.mkfifo(tmp_path / "a.png")
  for path in (tmp_path / "a.png", tmp_path, "/dev/zero"):
    with pytest.raises(UnreadablePicture, match="not a regular file"):
      transforms.to_rgb(path)


def test_damaged_pictures_are_read_or_refused_with_one_line():
  """A short run of experiments/mutants.py."""
  rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
  files = list(samples().values())
  for number in range(400):
    data = mutate(files[number % len(files)], rng)
    try:
      crop = transforms.random_resized_crop(io.BytesIO(data), 16, np.random.default_rng(0), 0.3, number % 2 == 0)
      outcomes["read"] += 1
      assert crop.shape == (16, 16, 3)
    except UnreadablePicture as error:
      outcomes["refused"] += 1
      assert len(str(error).splitlines()) == 1 and not re.search("0x[0-9a-f]{8}", str(error))
  assert min(outcomes.values()) > 50
