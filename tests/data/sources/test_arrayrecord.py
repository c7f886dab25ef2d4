"""Image files in ArrayRecord files: the written source equals the folder it was made from."""

import json
import pickle

import numpy as np
from PIL import Image
import pytest

from flextok_jax import tokenize
from flextok_jax.config import derive
from flextok_jax.data import pipeline
from flextok_jax.data.shards import files as shard_files
from flextok_jax.data.shards import writer
from flextok_jax.data.shards.images import ImageRecords, ImageShards
from flextok_jax.data.shards.tokens import TokenShards
from flextok_jax.data.sources import base
from flextok_jax.data.sources.arrayrecord import ArrayRecord
from flextok_jax.data.sources.folder import Folder
from flextok_jax.data.sources.synthetic import CLASS_NAMES, Synthetic
from flextok_jax.training.inputs import image_data
from tests.support.commands import config_file, run
from tests.support.token_shards import write_records

OFF = dict(tfds=dict(weight=0.0))


def write_folder(path, count):
  """Writes files of every format in the classes owl and tree_frog, one of them with sidecar captions."""
  rng = np.random.default_rng(count)
  for i in range(count):
    folder = path / ("owl", "tree_frog")[i % 2]
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((56 + i, 40))
    picture.save(folder / f"{i:02d}.{('jpg', 'png', 'webp')[i % 3]}")
  (path / "owl" / "02.txt").write_text("an owl\nanother owl")
  return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  root = tmp_path_factory.mktemp("pictures")
  write_folder(root / "validation", 4)
  return write_folder(root / "train", 11)


def folder_sources(pictures):
  return OFF | dict(folder=dict(weight=1.0, path=str(pictures), val_path=str(pictures.parent / "validation")))


def config(sources, **data):
  return derive(data=dict(num_threads=2, prefetch=1, sources=sources) | data)


def written_sources(out):
  return OFF | dict(arrayrecord=dict(weight=1.0, path=str(out)))


@pytest.fixture(scope="module")
def written(pictures, tmp_path_factory):
  """Returns both splits, written by the command."""
  out = tmp_path_factory.mktemp("images") / "shards"
  file = config_file(out.parent / "data.py", data=dict(sources=folder_sources(pictures)))
  run(tokenize, "--what=images", f"--config={file}", f"--out={out}", "--shards=3")
  run(tokenize, "--what=images", f"--config={file}", f"--out={out}", "--split=validation")
  return out


def write(out, cfg, **options):
  return write_records(out, ImageRecords(4), cfg, **options)


def source_of(out, split="train"):
  return ArrayRecord(split, str(out))


def same(a, b):
  return np.array_equal(np.asarray(a["image"]), np.asarray(b["image"])) and all(
    a[k] == b[k] for k in ("label", "caption", "captions", "num_objects")
  )


@pytest.mark.parametrize("split, count", [("train", 11), ("validation", 4)])
def test_source_equals_the_folder(pictures, written, split, count):
  folder = Folder(split, str(pictures), str(pictures.parent / "validation"))
  source = source_of(written, split)
  assert len(source) == len(folder) == count and source.class_names == folder.class_names == ("owl", "tree_frog")
  assert all(same(source[i], folder[i]) for i in range(count))
  assert source[1]["captions"] == ("an owl", "another owl") and (source.framed, source.flip) == (False, True)
  stored = [source.view(i, lambda file: file.read())["image"] for i in range(count)]
  assert sorted(stored) == sorted(path.read_bytes() for path in (pictures.parent / split).glob("*/*.[jpw]*"))
  assert same(pickle.loads(pickle.dumps(source))[2], source[2])  # as it is sent to worker processes


def test_batches_depend_only_on_seed_and_step(written):
  def steps(count, process=(0, 1), start=0, **data):
    batches = pipeline.train_batches(
      image_data(config(written_sources(written), **data)),
      global_batch=6,
      image_size=16,
      seed=0,
      start_step=start,
      process_index=process[0],
      process_count=process[1],
    )
    return [next(batches) for _ in range(count)]

  def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)

  reference = steps(4)
  assert reference[0]["image"].shape == (6, 16, 16, 3) and not equal(reference[0], reference[1])
  assert equal(steps(1, start=3)[0], reference[3])
  parts = [steps(2, (p, 2)) for p in range(2)]
  for step in range(2):
    assert equal({k: np.concatenate([part[step][k] for part in parts]) for k in reference[0]}, reference[step])
  held_out = pipeline.eval_set(image_data(config(written_sources(written))), "arrayrecord", image_size=16, num_images=9)
  assert held_out["image"].shape == (4, 16, 16, 3)


def test_several_processes_and_reruns_write_the_same_files(pictures, written, tmp_path):
  cfg = config(folder_sources(pictures))
  files = lambda out: {p.name: p.read_bytes() for p in (out / "train").glob("*.array_record")}
  assert write(tmp_path, cfg, num_shards=3, process_index=1, process_count=2) is None
  with pytest.raises(FileNotFoundError, match=r"meta.json is missing, so these image shards are not complete: rerun"):
    source_of(tmp_path)
  meta = write(tmp_path, cfg, num_shards=3, process_index=0, process_count=2)
  assert files(tmp_path) == files(written) and meta == ImageShards(written).meta
  damaged = tmp_path / "train" / "images-00001-of-00003.array_record"
  damaged.write_bytes(damaged.read_bytes()[:-1])
  with pytest.raises(ValueError, match="delete it and rerun"):
    source_of(tmp_path)
  write(tmp_path, cfg, num_shards=3)
  assert files(tmp_path) == files(written)
  with pytest.raises(ValueError, match="begun with other settings: num_images is 11 there and 5 here"):
    write(tmp_path, cfg, num_images=5)


def test_rendered_images_are_stored_losslessly(tmp_path):
  drawn = OFF | dict(synthetic=dict(weight=1.0, render_size=16))
  write(tmp_path, config(drawn), num_images=7, num_shards=2)
  source, scenes = source_of(tmp_path), Synthetic("train", 16)
  assert (source.framed, source.flip) == (scenes.framed, scenes.flip) == (True, True)
  assert all(same(source[i], base.read(scenes, i)[0]) for i in range(7))
  assert source.class_names == CLASS_NAMES
  assert not pipeline.Augment(image_data(config(drawn, flip=False)), source, 16).varies  # composed: never cropped


def test_croppable_and_uncroppable_sources_do_not_mix(pictures, tmp_path):
  mixed = folder_sources(pictures) | dict(photos=dict(weight=1.0))
  with pytest.raises(
    ValueError, match="folder and photos do not mix in image shards.*: write them to separate folders"
  ):
    write(tmp_path / "out", config(mixed), num_images=4)
  assert not (tmp_path / "out").exists()


def test_unreadable_files_and_damaged_records_are_skipped(tmp_path):
  folder = write_folder(tmp_path / "train", 11)
  write_folder(tmp_path / "validation", 2)
  whole = (folder / "owl" / "00.jpg").read_bytes()
  (folder / "owl" / "06.jpg").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r"1 of 11 images are unreadable, .*06.jpg: Truncated"):
    write(tmp_path / "out", config(folder_sources(folder), max_unreadable=0.0))
  meta = write(tmp_path / "out", config(folder_sources(folder)))
  assert meta["num_records"] == 10
  # Damage after writing: to the bytes of an image, and to the file that contains it.
  path = tmp_path / "out" / "train" / "images-00000-of-00001.array_record"
  records = [ImageShards(tmp_path / "out")[i] for i in range(10)]
  records[3]["data"] = b"bad" * 20
  writer._write_shard(path, map(ImageShards.pack, records))
  bent = bytearray(path.read_bytes())
  place = bent.index(records[8]["data"])
  bent[place + 20] ^= 0xFF
  path.write_bytes(bent)
  text = (path.parent / "meta.json").read_text()
  (path.parent / "meta.json").write_text(json.dumps({**json.loads(text), "shard_bytes": [path.stat().st_size]}))
  source = source_of(tmp_path / "out")
  for index, words in (
    (3, r"Shards\(.*\) \[3\]: in none of the formats"),
    (8, "record 8 cannot be read .* delete the file"),
  ):
    with pytest.raises(base.UnreadableRecord, match=words) as caught:
      source[index]
    assert "\n" not in str(caught.value)
  data = image_data(config(written_sources(tmp_path / "out")))
  batch = next(pipeline.train_batches(data, global_batch=10, image_size=8, seed=0))
  assert batch["unreadable"].sum() == 2


def test_incompatible_folders_are_one_line_errors(written, tmp_path):
  def refused(pattern, call, error=ValueError):
    with pytest.raises(error, match=pattern) as caught:
      call()
    assert "\n" not in str(caught.value)

  refused("set data.sources.arrayrecord.path", lambda: source_of(""))
  refused(
    r"no image shards of split 'train' in .*: write them with python -m flextok_jax.tokenize --what=images "
    r"--config=FILE --out=\S*absent --split=train",
    lambda: source_of(tmp_path / "absent"),
    FileNotFoundError,
  )
  refused("meta.json does not describe token shards .what is 'images'.", lambda: TokenShards(written))
  with pytest.raises(ValueError, match="not a record of images"):
    ImageShards(written).parse(shard_files.pack([1], dict(label=0, num_objects=0, captions=[])))
