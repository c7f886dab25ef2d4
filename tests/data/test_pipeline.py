"""The global batch of step s is a pure function of (seed, s)."""

import dataclasses

import numpy as np
from PIL import Image
import pytest

from flextok_jax.data import pipeline, transforms
from flextok_jax.data.sources import photos, synthetic
from tests.support.pictures import write_damaged_jpegs

SIZE = 16
NO_PHOTOS = dict(photos=dict(weight=0.0, min_crop=64))


def images(sources=(), num_threads=2, num_workers=0, prefetch=1, max_unreadable=0.01, **kwargs) -> pipeline.ImageData:
  """Returns scenes and photographs, three to one."""
  known = dict(synthetic=dict(weight=0.75, render_size=16), photos=dict(weight=0.25, min_crop=64))
  crops = dict(crop="random", crop_min_area=0.4, flip=True, reduce_jpeg=True) | kwargs
  loading = pipeline.Loading(num_threads, num_workers, prefetch)
  return pipeline.ImageData(known | dict(sources), **crops, loading=loading, max_unreadable=max_unreadable)


def steps(data, count, **kwargs):
  batches = pipeline.train_batches(data, **(dict(global_batch=12, image_size=SIZE, seed=0) | kwargs))
  return [next(batches) for _ in range(count)]


def equal(a: dict, b: dict) -> bool:
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def reference():
  return steps(images(), 4)


def test_shapes(reference):
  for batch in reference:
    assert batch["image"].shape == (12, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
    for key in ("label", "num_objects", "unreadable"):
      assert batch[key].shape == (12,) and batch[key].dtype == np.int32


def test_steps_and_seeds_differ(reference):
  drawn = np.concatenate([b["image"] for b in reference])
  assert len({i.tobytes() for i in drawn}) == len(drawn)
  assert not equal(reference[0], steps(images(), 1, seed=1)[0])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_contiguous_rows(reference, processes):
  parts = [steps(images(), 4, process_index=p, process_count=processes) for p in range(processes)]
  for s, batch in enumerate(reference):
    joined = {k: np.concatenate([part[s][k] for part in parts]) for k in batch}
    assert equal(joined, batch)


def test_restart_at_a_step(reference):
  for start in (1, 3):
    assert equal(steps(images(), 1, start_step=start)[0], reference[start])
  restarted = steps(images(), 2, start_step=2, process_index=1, process_count=2)
  assert all(equal(r, {k: v[6:] for k, v in full.items()}) for r, full in zip(restarted, reference[2:]))


def test_distant_steps_are_random_access():
  far = steps(images(), 2, start_step=10_000_000)
  assert equal(far[1], steps(images(), 1, start_step=10_000_001)[0])


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_number_of_threads_has_no_effect(reference, threads):
  assert all(equal(a, b) for a, b in zip(steps(images(num_threads=threads, prefetch=3), 3), reference))


def test_worker_processes_have_no_effect(reference):
  assert all(equal(a, b) for a, b in zip(steps(images(num_workers=2), 3), reference))


def test_weights_are_respected():
  counts = np.zeros(2)
  for batch in steps(images(), 5, global_batch=40):
    drawn = (batch["num_objects"] > 0).sum()  # only scenes have a number of objects
    counts += (drawn, 40 - drawn)
  assert counts.tolist() == [150, 50]


def test_a_source_is_independent_of_the_mixture():
  """Scenes come in the same order for any set of other sources."""
  alone = steps(images(sources=NO_PHOTOS), 2)
  scenes = [image.tobytes() for b in steps(images(), 2) for image, n in zip(b["image"], b["num_objects"]) if n > 0]
  assert scenes == [i.tobytes() for b in alone for i in b["image"]][: len(scenes)]


def write_folder(path, count):
  path.mkdir()
  for i in range(count):
    Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(path / f"{i}.png")
  return str(path)


def folder_data(tmp_path, count, **kwargs):
  folder = dict(weight=1.0, path=write_folder(tmp_path / "train", count), val_path=write_folder(tmp_path / "val", 5))
  off = dict(synthetic=dict(weight=0.0), photos=dict(weight=0.0))
  return images(sources=off | dict(folder=folder), **kwargs)


def test_every_epoch_visits_every_record_in_a_new_order(tmp_path):
  data = folder_data(tmp_path, 12, crop="center")
  orders = [(b["image"][:, 0, 0, 0] // 10).tolist() for b in steps(data, 3)]
  assert all(sorted(o) == list(range(12)) for o in orders)
  assert orders[0] != orders[1] != orders[2]


def test_unreadable_files_are_counted_per_row(tmp_path):
  data = folder_data(tmp_path, 12, crop="center")
  (tmp_path / "train" / "3.png").write_text("broken")
  batches = steps(data, 2)
  for batch in batches:
    assert batch["unreadable"].sum() == 1
    values = batch["image"][:, 0, 0, 0] // 10
    assert 3 not in values and values[batch["unreadable"] == 1].tolist() == [4]
  again = steps(data, 2, process_index=1, process_count=3)
  assert all(equal(a, {k: v[4:8] for k, v in b.items()}) for a, b in zip(again, batches))


def test_composed_scenes_are_not_cropped_or_flipped():
  only = NO_PHOTOS
  still, flipped = steps(images(sources=only, flip=False), 1)[0], steps(images(sources=only, flip=True), 1)[0]
  mirrored = 0
  for a, b in zip(still["image"], flipped["image"]):
    assert np.array_equal(a, b) or np.array_equal(a[:, ::-1], b)
    mirrored += not np.array_equal(a, b)
  assert 2 <= mirrored <= 10
  assert equal(still, steps(images(sources=only, flip=False, crop="center"), 1)[0])


@pytest.mark.parametrize(
  "make,kwargs,words",
  [
    (images, dict(process_count=5), "global_batch=12 is not divisible by 5 processes"),
    (images, dict(global_batch=0), "global_batch=0"),
    (lambda: images(sources=dict(synthetic=dict(weight=0.0), photos=dict(weight=0.0))), {}, "no data source has a"),
    (
      lambda: images(sources=dict(photos=dict(weight=-1.0, min_crop=64))),
      {},
      "weight of source 'photos' must be at least 0, got -1.0",
    ),
    (lambda: images(crop="middle"), {}, "unknown crop 'middle'"),
    (lambda: images(crop_min_area=0.0), {}, "crop_min_area=0.0 must be in"),
    (lambda: images(sources=dict(synthetic=dict(weight=1.0, render_size=4))), {}, "render_size"),
  ],
)
def test_bad_settings_are_one_line(make, kwargs, words):
  with pytest.raises(ValueError, match=words) as caught:
    steps(make(), 1, **kwargs)
  assert "\n" not in str(caught.value)


def test_unknown_source_is_refused():
  with pytest.raises(ValueError, match="unknown data source 'imagenet'"):
    images(sources=dict(imagenet=dict(weight=1.0)))
  with pytest.raises(ValueError, match="unknown data source 'laion'"):
    pipeline.eval_set(images(), "laion", image_size=SIZE, num_images=2)


def test_eval_set():
  one = pipeline.eval_set(images(), "synthetic", image_size=SIZE, num_images=8)
  more = pipeline.eval_set(images(flip=False, crop="center"), "synthetic", image_size=SIZE, num_images=12)
  assert one["image"].shape == (8, SIZE, SIZE, 3) and len(one["caption"]) == 8
  assert np.array_equal(one["image"], more["image"][:8]) and one["caption"] == more["caption"][:8]
  assert one["label"].dtype == np.int32 and one["num_objects"].dtype == np.int32
  assert all(synthetic.CLASS_NAMES[n] in c for n, c in zip(one["label"], one["caption"]))
  few = pipeline.eval_set(images(), "photos", image_size=SIZE, num_images=10_000)
  assert len(few["image"]) == photos.CROPS * len(photos.VALIDATION)
  with pytest.raises(ValueError, match="at least one image"):
    pipeline.eval_set(images(), "photos", image_size=SIZE, num_images=0)


def test_evaluation_stops_beyond_a_share_of_unreadable_files(tmp_path, caplog):
  data = folder_data(tmp_path, 12)
  folder = tmp_path / "val"
  for i in range(12):
    (folder / f"{i}.png").write_bytes((tmp_path / "train" / f"{i}.png").read_bytes())
  (folder / "3.png").write_text("broken")
  whole = pipeline.EvalImages(data, "folder", image_size=SIZE, num_images=12)
  values = (np.concatenate([whole[:5], whole[5:], whole[:5]])[:12, 0, 0, 0] // 10).tolist()
  assert sorted(values) == [0, 1, 2, 4, 4, *range(5, 12)]
  assert "1 of 12 images of source 'folder' are unreadable: the next" in caplog.text
  (folder / "7.png").write_text("broken")
  pipeline.eval_set(dataclasses.replace(data, max_unreadable=0.2), "folder", image_size=SIZE, num_images=12)
  with pytest.raises(ValueError, match="2 of 12 images of source 'folder' are unreadable, .*max_unreadable=0.01"):
    pipeline.eval_set(data, "folder", image_size=SIZE, num_images=12)


def jpeg_data(root, **kwargs) -> pipeline.ImageData:
  path = write_damaged_jpegs(root)
  off = dict(synthetic=dict(weight=0.0), photos=dict(weight=0.0))
  return images(off | dict(folder=dict(weight=1.0, path=str(path), val_path=str(root / "validation"))), **kwargs)


@pytest.mark.parametrize("crop", ["random", "center"])
def test_reduced_decoding_is_close_to_full_decoding(crop, tmp_path):
  data = jpeg_data(tmp_path, crop=crop)
  pair = (dataclasses.replace(data, reduce_jpeg=reduce) for reduce in (False, True))
  full, reduced = (next(pipeline.train_batches(d, global_batch=8, image_size=64, seed=0)) for d in pair)
  assert full["unreadable"].tolist() == reduced["unreadable"].tolist() and full["unreadable"].sum() == 2
  gap = np.abs(full["image"].astype(float) - reduced["image"])
  assert 0 < gap.mean() < 3 and gap.mean((1, 2, 3)).max() < 4


def test_evaluation_images_are_decoded_at_full_size(tmp_path):
  held_out = pipeline.eval_set(jpeg_data(tmp_path), "folder", image_size=32, num_images=1)
  assert np.array_equal(held_out["image"][0], transforms.center_crop(tmp_path / "validation" / "0.jpg", 32))
