"""Batches of several shapes: each of one shape, a pure function of (seed, step); pictures by their aspect ratio."""

import dataclasses

import numpy as np
from PIL import Image
import pytest

from flextok_jax.data import pipeline, shapes
from tests.data.test_pipeline import NO_PHOTOS, SIZE, equal, images, steps

SHAPES = ((16, 16), (8, 24), (24, 8))
WEIGHTS = (0.5, 0.25, 0.25)
SIZES = [(40, 40), (38, 42), (20, 60), (22, 70), (60, 20), (45, 45), (44, 44), (41, 40)]  # five, two and one


def drawn(**kwargs) -> pipeline.ImageData:
  return dataclasses.replace(images(**kwargs), shapes=SHAPES, shape_weights=WEIGHTS)


def folder(tmp_path, sizes=SIZES, **kwargs) -> pipeline.ImageData:
  path = tmp_path / "pictures"
  path.mkdir()
  for i, (height, width) in enumerate(sizes):
    Image.new("RGB", (width, height), (10 * i, 0, 0)).save(path / f"{i}.png")
  sources = dict(
    synthetic=dict(weight=0.0),
    photos=dict(weight=0.0),
    folder=dict(weight=1.0, path=str(path), val_path=str(tmp_path / "val")),
  )
  return dataclasses.replace(images(sources, **kwargs), shapes=SHAPES)


@pytest.fixture(scope="module")
def reference():
  return steps(drawn(), 8)


def test_each_batch_has_one_shape_and_shapes_have_their_shares(reference):
  found = [batch["image"].shape for batch in reference]
  assert all(shape[0] == 12 and shape[3] == 3 for shape in found)
  assert [found.count((12, *shape, 3)) for shape in SHAPES] == [4, 2, 2]
  rows = [row.tobytes() for batch in reference for row in batch["image"]]
  assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_contiguous_rows_of_one_shape(reference, processes):
  parts = [steps(drawn(), 8, process_index=p, process_count=processes) for p in range(processes)]
  for s, batch in enumerate(reference):
    assert equal({k: np.concatenate([part[s][k] for part in parts]) for k in batch}, batch)


def test_neither_restarts_nor_threads_nor_workers_change_batches(reference):
  for start in (1, 6):
    assert equal(steps(drawn(), 1, start_step=start)[0], reference[start])
  assert all(equal(a, b) for a, b in zip(steps(drawn(num_threads=5, prefetch=3), 4), reference))
  assert all(equal(a, b) for a, b in zip(steps(drawn(num_workers=2), 4), reference))
  far = steps(drawn(), 2, start_step=1_000_000)
  assert equal(far[1], steps(drawn(), 1, start_step=1_000_001)[0])


def test_one_square_shape_gives_the_batches_of_image_size():
  one = dataclasses.replace(images(), shapes=((SIZE, SIZE),), shape_weights=(3.0,))
  assert all(equal(a, b) for a, b in zip(steps(one, 3, image_size=99), steps(images(), 3)))


def test_pictures_are_divided_by_their_aspect_ratio(tmp_path):
  data = folder(tmp_path, crop="center", flip=False)
  buckets = data.buckets(16)
  assert [bucket.shape for bucket in buckets] == list(SHAPES)
  assert [bucket.pictures for bucket in buckets] == [5, 2, 1]
  assert [bucket.weight for bucket in buckets] == pytest.approx([5 / 8, 2 / 8, 1 / 8])
  (wide,) = (bucket for bucket in buckets if bucket.shape == (8, 24))
  assert wide.kept == pytest.approx((np.mean([1, 66 / 70]), 66 / 70)) and wide.enlarged == 0
  batches = steps(data, 8, global_batch=10)
  places = [batch["image"].shape[1:3] for batch in batches]
  assert [places.count(shape) for shape in SHAPES] == [5, 2, 1]
  for batch in batches:  # every picture of the shape equally often
    values = np.bincount(batch["image"][:, 0, 0, 0] // 10, minlength=8)
    expected = {(16, 16): [2, 2, 0, 0, 0, 2, 2, 2], (8, 24): [0, 0, 5, 5, 0, 0, 0, 0]}
    assert values.tolist() == expected.get(batch["image"].shape[1:3], [0, 0, 0, 0, 10, 0, 0, 0])


def test_shapes_without_pictures_are_left_out(tmp_path):
  buckets = folder(tmp_path, SIZES[:2]).buckets(16)
  assert [bucket.shape for bucket in buckets] == [(16, 16)] and buckets[0].weight == 1


def test_unreadable_pictures_are_in_no_bucket(tmp_path):
  data = dataclasses.replace(folder(tmp_path), max_unreadable=0.2)
  (tmp_path / "pictures" / "3.png").write_text("broken")
  assert [bucket.pictures for bucket in data.buckets(16)] == [5, 1, 1]
  (tmp_path / "pictures" / "4.png").write_text("broken")
  with pytest.raises(ValueError, match="2 of 8 images of source 'folder' are unreadable"):
    data.buckets(16)


def test_a_damaged_picture_gives_its_place_to_one_of_its_shape(tmp_path):
  """A file whose header is whole."""
  noise = np.random.default_rng(0).integers(0, 255, (20, 60, 3), np.uint8)
  data = folder(tmp_path, [*SIZES, (21, 61)], crop="center", flip=False)
  path = tmp_path / "pictures" / "2.png"
  Image.fromarray(noise).save(path)
  path.write_bytes(path.read_bytes()[:400])
  for batch in steps(data, 9, global_batch=6):
    if batch["image"].shape[1:3] == (8, 24):
      values = batch["image"][:, 0, 0, 0] // 10
      assert set(values) == {3, 8} and batch["unreadable"].sum() == 2


def test_a_mixture_keeps_the_weights_of_its_sources(tmp_path):
  data = dataclasses.replace(drawn(), shape_weights=(1, 1, 2))
  drawn_scenes = sum((batch["num_objects"] > 0).sum() for batch in steps(data, 8, global_batch=16))
  assert drawn_scenes == 96  # three of four
  assert [bucket.weight for bucket in data.buckets(16)] == [0.25, 0.25, 0.5]


def test_of_one_aspect_ratio_the_largest_shape_that_does_not_enlarge():
  squares = ((32, 32), (64, 64), (32, 64))
  sizes = np.array([(500, 480), (64, 64), (63, 64), (8, 8), (40, 90), (10, 30)])
  assert shapes.nearest(sizes, squares).tolist() == [1, 1, 0, 0, 2, 2]


def test_table_of_costs(tmp_path):
  lines = shapes.table(folder(tmp_path).buckets(16)).splitlines()
  assert [line.split() for line in lines[1:]] == [
    ["16", "x", "16", "62.5%", "5", "97.6%", "90.5%", "0.0%"],
    ["8", "x", "24", "25.0%", "2", "97.1%", "94.3%", "0.0%"],
    ["24", "x", "8", "12.5%", "1", "100.0%", "100.0%", "0.0%"],
  ]
  assert lines[0].split() == ["height", "x", "width", "batches", "pictures", "kept", "least", "kept", "enlarged"]
  assert shapes.table(drawn().buckets(16)).splitlines()[1].split()[3:] == ["50.0%", "all", "-", "-", "-"]


@pytest.mark.parametrize(
  "fields,words",
  [
    (dict(shape_weights=(1.0,)), "1 weights for 3 data.shapes"),
    (dict(shapes=(), shape_weights=(1.0,)), "data.shape_weights without data.shapes"),
    (dict(shape_weights=()), "source 'photos', which are drawn: set data.shape_weights"),
  ],
)
def test_bad_settings_are_one_line(fields, words):
  with pytest.raises(ValueError, match=words) as caught:
    dataclasses.replace(drawn(), **fields).buckets(16)
  assert "\n" not in str(caught.value)


def test_scenes_in_a_shape_are_cropped_in_the_middle():
  data = dataclasses.replace(images(NO_PHOTOS, flip=False), shapes=((16, 16), (8, 16)), shape_weights=(1, 1))
  assert {batch["image"].shape for batch in steps(data, 2)} == {(12, 16, 16, 3), (12, 8, 16, 3)}
