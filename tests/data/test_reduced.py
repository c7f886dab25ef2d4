"""Large JPEG files are decoded at a fraction of their size, and the crops stay what they were."""

import io

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin
import pytest

from flextok_jax.config import derive
from flextok_jax.data import pipeline, transforms
from flextok_jax.data.shards import split_images
from flextok_jax.data.sources import photos
from flextok_jax.data.sources import registry as sources

PHOTOS = [photo[:2] for photo in photos.TRAIN + photos.VALIDATION if photo[0] == "skimage"]


def photograph(name) -> Image.Image:
  return transforms.to_rgb(photos.photo_path("skimage", name))


def jpeg(image: Image.Image, orientation: int = 1) -> io.BytesIO:
  buffer, exif = io.BytesIO(), Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  image.save(buffer, "JPEG", quality=90, exif=exif)
  return buffer


def crops(file: io.BytesIO, size: int, seed: int):
  """{kind of crop: (of the full decode, of the reduced one)}."""

  def both(crop):
    results = []
    for reduce in (False, True):
      file.seek(0)
      results.append(crop(reduce))
    return results

  return {
    "center": both(lambda reduce: transforms.center_crop(file, size, reduce)),
    "random": both(lambda reduce: transforms.random_resized_crop(file, size, np.random.default_rng(seed), 0.4, reduce)),
  }


@pytest.fixture
def drafts(monkeypatch):
  """The sides that JPEG files are asked for."""
  asked, draft = [], JpegImagePlugin.JpegImageFile.draft
  monkeypatch.setattr(
    JpegImagePlugin.JpegImageFile, "draft", lambda self, mode, size: asked.append(size) or draft(self, mode, size)
  )
  return asked


@pytest.mark.parametrize("name", [name for _, name in PHOTOS])
def test_crops_of_photographs_are_close_to_those_of_the_full_decode(name, drafts):
  """The worst are those of the finest texture: grass, gravel, spokes of a motorcycle.

  Seen over all of them, these sizes and three seeds: mean gap at most 4.9 (random) and 5.4 (centre) of 255, 0.7 and
  1.7 on average; PSNR at least 31.2 and 30.9 dB.
  """
  picture = photograph(name)
  file = jpeg(picture)
  for size in (min(picture.size) // n for n in (2, 3, 4, 5, 8)):
    for full, reduced in crops(file, size, seed=size).values():
      gap = np.abs(full.astype(float) - reduced)
      assert gap.mean() < 6 and 10 * np.log10(255**2 / max((gap**2).mean(), 1e-9)) > 30
  assert {picture.width // width for width, _ in drafts} == {2, 4, 8}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_pictures_lie_where_they_did(orientation, drafts):
  """Of a smooth picture, where a shift by half a pixel would show, whose sides no reduction divides."""
  y, x = np.mgrid[:301, :403] / 60
  smooth = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(3 * y)], -1) * 100 + 128
  file = jpeg(Image.fromarray(smooth.astype(np.uint8)), orientation)
  for size, seed in ((32, 0), (32, 1), (61, 2), (130, 3)):
    for full, reduced in crops(file, size, seed).values():
      assert np.abs(full.astype(float) - reduced).mean() < 1  # 0.85 at most was seen; half a pixel makes 3 and more
  assert {403 // width for width, _ in drafts} == {2, 4, 8}


def test_no_reduction_means_the_same_pixels(drafts):
  """Nothing changes for crops less than twice as large as wanted, for other files, and for what is decoded."""
  picture = photograph("coffee.png")  # 600 x 400
  for size in (201, 256, 400, 500):
    for full, reduced in crops(jpeg(picture), size, seed=size).values():
      assert np.array_equal(full, reduced)
  for kind in ("PNG", "WEBP"):
    file = io.BytesIO()
    picture.save(file, kind)
    assert all(np.array_equal(*pair) for pair in crops(file, 32, 0).values())
  assert not drafts
  opened = Image.open(jpeg(picture))
  opened.load()
  for image in (np.asarray(picture), picture, opened):
    assert np.array_equal(*(transforms.center_crop(image, 32, reduce) for reduce in (False, True)))


def test_a_reduced_crop_has_all_the_pixels_it_needs(monkeypatch):
  """Nothing is enlarged that a full decode would not enlarge, and the draws are those of a full decode."""
  regions, resize = [], Image.Image.resize
  file = jpeg(photograph("coffee.png").resize((331, 509)))
  monkeypatch.setattr(
    Image.Image,
    "resize",
    lambda self, size, resample, box, reducing_gap: (
      regions.append(box) or resize(self, size, resample, box, reducing_gap)
    ),
  )
  for seed in range(60):
    size = int(np.random.default_rng(seed).integers(16, 400))
    states = []
    for reduce in (False, True):
      file.seek(0)
      rng = np.random.default_rng(seed)
      transforms.random_resized_crop(file, size, rng, 0.1, reduce)
      states.append(rng.random())
    full, reduced = ((box[2] - box[0], box[3] - box[1]) for box in regions[-2:])
    assert states[0] == states[1] and (full == reduced or min(reduced) >= size)
    assert full[0] / reduced[0] == full[1] / reduced[1] in (1, 2, 4, 8)
    assert min(full) / size < 2 * full[0] / reduced[0] or full[0] / reduced[0] == 8  # no pixel more than it needs
  assert len(regions) == 120


def write_jpegs(folder, count):
  folder.mkdir(parents=True)
  for i in range(count):
    photograph("astronaut.png").crop((4 * i, 0, 400 + 4 * i, 300)).save(folder / f"{i}.jpg", quality=95)
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Eight photographs of 400 x 300 px, of which one ends too early and another is damaged; one held out."""
  root = tmp_path_factory.mktemp("jpegs")
  path = write_jpegs(root / "train", 8)
  whole = (path / "3.jpg").read_bytes()
  (path / "3.jpg").write_bytes(whole[: len(whole) // 2])
  (path / "6.jpg").write_bytes(whole[:2] + b"\x00" * 500)
  write_jpegs(root / "validation", 1)
  return path


def config(folder, **data):
  cfg = dict(weight=1.0, path=str(folder), val_path=str(folder.parent / "validation"))
  return derive(data=dict(global_batch=8, num_threads=2, sources=dict(tfds=dict(weight=0.0), folder=cfg)) | data)


@pytest.mark.parametrize("crop", ["random", "center"])
def test_batches(folder, crop):
  configs = (config(folder, crop=crop, reduce_jpeg=reduce).data for reduce in (False, True))
  full, reduced = (next(pipeline.train_batches(data, image_size=64, seed=0)) for data in configs)
  assert full["unreadable"].tolist() == reduced["unreadable"].tolist() and full["unreadable"].sum() == 2
  gap = np.abs(full["image"].astype(float) - reduced["image"])
  assert 0 < gap.mean() < 3 and gap.mean((1, 2, 3)).max() < 4


def test_a_damaged_file_is_unreadable_at_any_size(folder):
  source = sources.make_source("folder", config(folder).data.sources.folder, "train")
  for crop in (transforms.to_rgb, lambda file: transforms.center_crop(file, 32, True)):
    for index, words in ((3, "3.jpg: .*truncated"), (6, "6.jpg: ")):
      with pytest.raises(sources.UnreadableRecord, match=words):
        source.view(index, crop)


def test_what_is_written_to_shards_or_evaluated_is_decoded_in_full(folder):
  images = split_images.Images(config(folder), "train", 32, None, 4)
  assert np.array_equal(images[0]["crops"][0], transforms.center_crop(folder / "0.jpg", 32))
  assert "unreadable" in images[3]
  held_out = pipeline.eval_set(config(folder).data, "folder", image_size=32, num_images=1)
  assert np.array_equal(held_out["image"][0], transforms.center_crop(folder.parent / "validation" / "0.jpg", 32))
  full = config(folder, reduce_jpeg=False)
  assert np.array_equal(images[0]["crops"], split_images.Images(full, "train", 32, None, 4)[0]["crops"])
