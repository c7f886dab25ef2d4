"""The tfds source on a real TFDS data set, which is built here as ArrayRecord files."""

import io
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from flextok_jax.config import derive
from flextok_jax.data import pipeline
from flextok_jax.data.sources import base
from flextok_jax.data.sources.tfds import Tfds
from flextok_jax.training.inputs import image_data

tfds = pytest.importorskip("tensorflow_datasets")


def picture(i: int) -> np.ndarray:
  return np.full((20, 24, 3), 20 * i, np.uint8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Returns a directory with tiny_pictures in ArrayRecord files and plain_records in TFRecord files."""
  root = str(tmp_path_factory.mktemp("tfds"))

  class TinyPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {
            "picture": tfds.features.Image(shape=(None, None, 3)),
            "note": tfds.features.Text(),
            "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
            "kind": tfds.features.ClassLabel(names=["dark_one", "bright"]),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(8), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
      for i in range(count):
        image = picture(i)
        if count == 8 and i == 5:  # truncated bytes
          buffer = io.BytesIO()
          Image.fromarray(np.random.default_rng(0).integers(0, 255, image.shape, np.uint8)).save(buffer, "PNG")
          image = io.BytesIO(buffer.getvalue()[:60])
        yield (
          i,
          {
            "picture": image,
            "kind": int(i >= 4),
            "note": f"number {i}",
            "captions": [{"id": j, "text": f"{j} ö {i}" if i != 2 else b"\xff"} for j in range(i % 4)],
          },
        )

  TinyPictures(data_dir=root, file_format="array_record").download_and_prepare()
  return root


def settings(data_dir, **kwargs):
  """Returns arguments of Tfds."""
  known = dict(name="tiny_pictures", data_dir=data_dir, train_split="train", val_split="test")
  return known | dict(image_key="picture", label_key="kind") | kwargs


def test_records(data_dir):
  source = Tfds("train", **settings(data_dir))
  assert len(source) == 8 and source.class_names == ("dark_one", "bright")
  seen, broken = {}, []
  for i in range(8):
    try:
      record = source[i]
    except base.UnreadableRecord as error:
      broken.append(error)
      continue
    value = np.asarray(record["image"])
    seen[int(value[0, 0, 0]) // 20] = record
    assert value.shape == (20, 24, 3)
  assert len(broken) == 1 and "tiny_pictures train" in str(broken[0])
  assert set(seen) == set(range(8)) - {5}
  assert all(r["label"] == int(v >= 4) for v, r in seen.items())
  assert seen[0]["caption"] == "dark one" and seen[7]["caption"] == "bright"


def test_batches_and_evaluation_set(data_dir):
  data = image_data(derive(data=dict(num_threads=2, sources=dict(tfds=settings(data_dir)))))
  batches = pipeline.train_batches(data, global_batch=4, image_size=8, seed=0)
  epoch = [next(batches) for _ in range(2)]
  assert sum(b["unreadable"].sum() for b in epoch) == 1
  held_out = pipeline.eval_set(data, "tfds", image_size=8, num_images=10)
  assert held_out["image"].shape == (3, 8, 8, 3)
  assert sorted(held_out["image"][:, 0, 0, 0]) == [0, 20, 40]
  no_label = Tfds("validation", **settings(data_dir, label_key=""))
  assert no_label[0]["label"] == -1 and no_label[0]["caption"] == ""
  sliced = Tfds("train", **settings(data_dir, train_split="train[:75%]"))
  assert len(sliced) == 6


def test_captions(data_dir):
  make = lambda key: Tfds("validation", **settings(data_dir, caption_key=key))
  source = make("note")
  assert sorted(source[i]["captions"] for i in range(3)) == [(f"number {i}",) for i in range(3)]
  source = make("captions/text")
  at = {int(np.asarray(make("note")[i]["image"])[0, 0, 0]) // 20: i for i in range(3)}
  record = source[at[1]]
  assert record["caption"] == "0 ö 1" and record["captions"] == ("0 ö 1",) and record["label"] == 0
  for number in (0, 2):  # without captions, and with one that is not UTF-8
    record = source[at[number]]
    assert (
      record["caption"] == "dark one" and source.view(at[number], np.size, with_captions=False)["caption"] == "dark one"
    )
  train = Tfds("train", **settings(data_dir, caption_key="captions/text"))
  read = [base.read(train, i)[0]["captions"] for i in range(8)]
  assert ("0 ö 7", "1 ö 7", "2 ö 7") in read and ("0 ö 6", "1 ö 6") in read


@pytest.mark.parametrize(
  "kwargs,words",
  [
    (dict(name="no_such_data_set"), "'no_such_data_set' cannot be found"),
    (dict(name="mnist"), "tfds build mnist --data_dir=.* --file_format=array_record"),
    (dict(train_split="trian"), "no split 'trian'; its splits are"),
    (dict(image_key="note"), "no image feature 'note'; its features are"),
    (dict(image_key="image"), "no image feature 'image'"),
    (dict(label_key="note"), "no integer label 'note'"),
    (dict(val_split="train"), "held out"),
    (dict(caption_key="captions"), "no text 'captions'; its features are"),
    (dict(caption_key="captions/id"), "no text 'captions/id'"),
    (dict(caption_key="note/text"), "no text 'note/text'"),
    (dict(caption_key="picture"), "no text 'picture'"),
  ],
)
def test_errors_are_one_line(data_dir, kwargs, words):
  with pytest.raises(ValueError, match=words) as caught:
    Tfds("train", **settings(data_dir, **kwargs))
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_works_without_tensorflow(data_dir):
  """In a process in which tensorflow cannot be imported."""
  program = """
import sys
from importlib import machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] == "tensorflow" else find(name, path, target))
from flextok_jax.data.sources.tfds import Tfds
source = Tfds("validation", "tiny_pictures", sys.argv[1], "train", "test", "picture", "kind")
assert source[1]["image"].size == (24, 20) and "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", program, data_dir], check=True, timeout=120)
