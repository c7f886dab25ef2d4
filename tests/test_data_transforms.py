"""Pictures of every stored mode become the RGB array that a person would expect."""

import io

import numpy as np
from PIL import Image
import pytest

from flextok_jax.data import transforms


def stored(image: Image.Image, kind: str = "PNG", **kwargs) -> io.BytesIO:
  buffer = io.BytesIO()
  image.save(buffer, kind, **kwargs)
  buffer.seek(0)
  return buffer


def rgb(image) -> np.ndarray:
  result = transforms.to_rgb(image)
  assert result.mode == "RGB"
  return np.asarray(result)


def halves() -> np.ndarray:
  """Left half red, right half blue: uint8 [8, 16, 3]."""
  array = np.zeros((8, 16, 3), np.uint8)
  array[:, :8, 0] = 200
  array[:, 8:, 2] = 200
  return array


def test_grey():
  grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
  assert (rgb(stored(Image.fromarray(grey))) == grey[..., None]).all()
  assert (rgb(grey) == grey[..., None]).all()
  assert (rgb(grey[..., None]) == grey[..., None]).all()
  assert (rgb(grey > 31) == np.where(grey > 31, 255, 0)[..., None]).all()
  bits = Image.fromarray(grey > 31)
  assert (rgb(stored(bits)) == np.where(grey > 31, 255, 0)[..., None]).all()


def test_16_bit_grey_is_scaled_not_clipped():
  grey = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
  expected = np.rint(grey / 257.0)
  assert np.abs(rgb(stored(Image.fromarray(grey))).astype(int) - expected[..., None]).max() <= 1
  assert np.abs(rgb(grey).astype(int) - expected[..., None]).max() <= 1
  assert np.abs(rgb(stored(Image.fromarray(grey), "TIFF")).astype(int) - expected[..., None]).max() <= 1


def test_floating_point_is_in_0_1():
  values = np.array([[-1.0, 0.0, 0.5, 1.0, 2.0, np.nan]], np.float32)
  assert rgb(values)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]


def test_palette():
  image = Image.fromarray(halves()).quantize(4)
  assert image.mode == "P"
  assert (rgb(stored(image)) == halves()).all()


def test_alpha_is_composited_on_white():
  array = np.concatenate([halves(), np.full((8, 16, 1), 255, np.uint8)], -1)
  array[:, :8, 3] = 0  # the red half is invisible
  array[:, 8:12, 3] = 128
  for image in (array, stored(Image.fromarray(array)), stored(Image.fromarray(array), "WEBP", lossless=True)):
    result = rgb(image).astype(int)
    assert (result[:, :8] == 255).all()
    assert np.abs(result[:, 8:12] - (127, 127, 227)).max() <= 2
    assert (result[:, 12:] == (0, 0, 200)).all()


def test_transparent_palette_and_grey_alpha():
  palette = Image.fromarray(halves()).quantize(4)
  red = palette.getpixel((0, 0))
  result = rgb(stored(palette, transparency=red))
  assert (result[:, :8] == 255).all() and (result[:, 8:] == (0, 0, 200)).all()
  la = Image.merge("LA", (Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 0)))
  assert (rgb(stored(la)) == 255).all()
  keyed = stored(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
  assert (rgb(keyed) == 255).all()


def test_cmyk():
  cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # full cyan
  red, green, blue = rgb(stored(cmyk, "JPEG", quality=95))[4, 4].astype(int)
  assert red < 40 and green > 130 and blue > 130


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
  upright = Image.fromarray(halves())
  undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
          7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
  kept = upright if undo is None else upright.transpose(undo)
  exif = Image.Exif()
  exif[0x0112] = orientation
  assert (rgb(stored(kept, exif=exif.tobytes())) == halves()).all()


def test_bad_arrays():
  with pytest.raises(ValueError, match=r"got \[4, 4, 2\]"):
    transforms.to_rgb(np.zeros((4, 4, 2), np.uint8))
  with pytest.raises(ValueError, match="int64"):
    transforms.to_rgb(np.zeros((4, 4), np.int64))


def test_center_crop_takes_the_middle():
  array = np.zeros((30, 90, 3), np.uint8)
  array[:, 30:60] = 255
  for image in (array, array.transpose(1, 0, 2)):
    crop = transforms.center_crop(image, 30)
    assert crop.shape == (30, 30, 3) and (crop == 255).all()
  crop = transforms.center_crop(array, 10)
  assert crop.shape == (10, 10, 3) and crop.mean() > 245
  assert transforms.center_crop(array, 64).shape == (64, 64, 3)  # small images are enlarged


def test_resizing_is_antialiased():
  fine = np.zeros((256, 256, 3), np.uint8)
  fine[:, ::2] = 255
  for size in (24, 32):
    assert np.abs(transforms.center_crop(fine, size).astype(int) - 127).max() < 20  # else 0 and 255


def test_extreme_shapes():
  for shape in ((1, 5000, 3), (5000, 1, 3), (1, 1, 3), (3, 2, 3)):
    image = np.full(shape, 77, np.uint8)
    assert (transforms.center_crop(image, 16) == 77).all()
    assert (transforms.random_resized_crop(image, 16, np.random.default_rng(0), 0.4) == 77).all()


def test_random_resized_crop_respects_the_area():
  y, x = np.mgrid[:120, :160]
  ramps = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
  rng = np.random.default_rng(0)
  shares = []
  for _ in range(100):
    crop = transforms.random_resized_crop(ramps, 32, rng, 0.5).astype(float)
    spans = [(crop[..., c].max() - crop[..., c].min()) * 32.0 / 31.0 for c in (0, 1)]
    shares.append(spans[0] * spans[1] / (120 * 160))
  assert min(shares) > 0.44 and max(shares) > 0.85 and np.std(shares) > 0.08
  same = [transforms.random_resized_crop(ramps, 32, np.random.default_rng(5), 0.5) for _ in range(2)]
  assert np.array_equal(*same)


def test_flip():
  assert (transforms.flip(halves())[:, :8] == (0, 0, 200)).all()


def test_load_images(tmp_path):
  (tmp_path / "b").mkdir()
  Image.fromarray(halves()).save(tmp_path / "b" / "one.png")
  Image.new("L", (5, 9), 50).save(tmp_path / "a.JPG", "JPEG")
  (tmp_path / ".hidden.png").write_text("x")
  images, names = transforms.load_images(str(tmp_path), 8)
  assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8
  assert names == ["a.JPG", "b/one.png"] and abs(int(images[0].mean()) - 50) < 3
  images, names = transforms.load_images([tmp_path / "a.JPG"], 8)
  assert names == [str(tmp_path / "a.JPG")]
  with pytest.raises(FileNotFoundError, match="nothing.png does not exist"):
    transforms.load_images(tmp_path / "nothing.png", 8)
  with pytest.raises(ValueError, match="no image was given"):
    transforms.load_images([], 8)
  (tmp_path / "b" / "bad.png").write_text("x")
  with pytest.raises(ValueError, match="bad.png cannot be read"):
    transforms.load_images(tmp_path, 8)
