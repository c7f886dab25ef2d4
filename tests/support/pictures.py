"""Folders of pictures, and comparison of source records."""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, features

from flextok_jax.data import transforms
from flextok_jax.data.sources import photos


def same_record(a: dict, b: dict) -> bool:
  """Whether two records of a source are equal."""
  return np.array_equal(np.asarray(a["image"]), np.asarray(b["image"])) and all(
    a[k] == b[k] for k in ("label", "caption", "num_objects")
  )


def write_classes(root: Path, count=4, size=(40, 30), classes=("bird", "tree_frog")) -> Path:
  """Writes `count` single-colour pictures per class and returns root."""
  for c, name in enumerate(classes):
    (root / name).mkdir(parents=True)
    for i in range(count):
      Image.new("RGB", size, (20 * i, 100 * c, 50)).save(root / name / f"{i}.png")
  return root


def write_jpegs(folder: Path, count: int) -> Path:
  """Writes photographs of 400 x 300 px to folder/0.jpg, folder/1.jpg, ... and returns folder."""
  folder.mkdir(parents=True)
  photograph = transforms.to_rgb(photos.photo_path("skimage", "astronaut.png"))
  for i in range(count):
    photograph.crop((4 * i, 0, 400 + 4 * i, 300)).save(folder / f"{i}.jpg", quality=95)
  return folder


def write_damaged_jpegs(root: Path) -> Path:
  """Writes eight photographs to root/train, with 3.jpg truncated and 6.jpg damaged, and one to root/validation."""
  path = write_jpegs(root / "train", 8)
  whole = (path / "3.jpg").read_bytes()
  (path / "3.jpg").write_bytes(whole[: len(whole) // 2])
  (path / "6.jpg").write_bytes(whole[:2] + b"\x00" * 500)
  write_jpegs(root / "validation", 1)
  return path


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
  """Returns the bytes of an image file."""
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


@functools.cache
def samples() -> dict[str, bytes]:
  """Returns {name: bytes} of small files of every format and mode that are read."""
  photograph = transforms.to_rgb(photos.photo_path("skimage", "astronaut.png")).resize((48, 32))
  grey, alpha, palette = photograph.convert("L"), photograph.convert("RGBA"), photograph.quantize(16)
  deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
  unit = Image.fromarray(np.asarray(grey).astype(np.float32))
  alpha.putalpha(grey)
  exif, text = Image.Exif(), PngImagePlugin.PngInfo()
  exif[0x010F], exif[0x0112], exif[0x011A] = "maker", 6, 72.0
  for zipped in (False, True):
    text.add_text("Comment", "a text", zip=zipped)
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>', zip=zipped)
  facts = dict(exif=exif.tobytes(), icc_profile=bytes(range(256)))
  files = {
    "rgb.png": encode(photograph, pnginfo=text, **facts),
    "palette.png": encode(palette, transparency=bytes(range(16))),
    "grey_alpha.png": encode(alpha.convert("LA")),
    "deep.png": encode(deep),
    "animated.png": encode(photograph, save_all=True, append_images=[grey.convert("RGB")]),
    "rgb.jpg": encode(photograph, "JPEG", comment=b"a text", **facts),
    "progressive.jpg": encode(grey, "JPEG", progressive=True, restart_marker_blocks=2),
    "cmyk.jpg": encode(photograph.convert("CMYK"), "JPEG"),
    "two.mpo": encode(photograph, "MPO", save_all=True, append_images=[photograph]),
    "rgb.webp": encode(photograph, "WEBP", **facts),
    "alpha.webp": encode(alpha, "WEBP", lossless=True),
    "animated.webp": encode(photograph, "WEBP", save_all=True, append_images=[alpha]),
    "animated.gif": encode(palette, "GIF", save_all=True, append_images=[grey], comment=b"a text"),
    "rgb.bmp": encode(photograph, "BMP"),
    "palette.bmp": encode(palette, "BMP"),
    "deep.tif": encode(deep, "TIFF", exif=exif),
    "float.tiff": encode(unit, "TIFF", compression="tiff_adobe_deflate"),
    "big.tif": encode(photograph, "TIFF", big_tiff=True),
    "rgb.ppm": encode(photograph, "PPM"),
    "deep.pgm": encode(deep, "PPM"),
    "plain.pgm": b"P2\n# a text\n3 2\n15\n0 3 7 11 15 5\n",
    "float.pfm": encode(unit, "PPM"),
  }
  for compression in ("tiff_lzw", "packbits", "jpeg"):
    files[f"{compression}.tif"] = encode(photograph, "TIFF", compression=compression)
  files["group4.tif"] = encode(grey.convert("1"), "TIFF", compression="group4")
  if features.check("avif"):
    files["alpha.avif"] = encode(alpha, "AVIF", exif=facts["exif"])
  if features.check("jpg_2000"):
    files["rgb.jp2"] = encode(photograph, "JPEG2000")
  return files
