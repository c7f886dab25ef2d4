"""Folders: classes, splits, sidecar captions, unreadable files and error messages."""

import json

from absl import logging
from PIL import Image
import pytest

from flextok_jax.data import transforms
from flextok_jax.data.sources import base
from flextok_jax.data.sources.folder import MAX_CAPTION_BYTES, Folder
from tests.support.pictures import same_record, write_classes, write_damaged_jpegs


def test_classes_are_subfolders(tmp_path):
  write_classes(tmp_path / "a")
  write_classes(tmp_path / "v", count=1, classes=("tree_frog", "unknown"))
  cfg = dict(path=str(tmp_path / "a"), val_path=str(tmp_path / "v"))
  train = Folder("train", **cfg)
  assert train.class_names == ("bird", "tree_frog")
  assert [train[i]["label"] for i in range(len(train))] == [0] * 4 + [1] * 4
  assert train[7]["caption"] == "tree frog" and train[7]["image"].getpixel((0, 0)) == (60, 100, 50)
  validation = Folder("validation", **cfg)
  assert [validation[i]["label"] for i in range(2)] == [1, -1]


def test_split_by_hash(tmp_path):
  write_classes(tmp_path, count=100, size=(2, 2))
  cfg = dict(path=str(tmp_path))
  files = [set(Folder(s, **cfg)._files) for s in ("train", "validation")]
  assert not files[0] & files[1] and len(files[0] | files[1]) == 200
  assert 2 <= len(files[1]) <= 25


def test_cyclic_links_are_not_followed(tmp_path):
  write_classes(tmp_path)
  (tmp_path / "bird" / "loop").symlink_to(tmp_path)
  cfg = dict(path=str(tmp_path), val_path=str(write_classes(tmp_path.parent / "elsewhere")))
  assert len(Folder("train", **cfg)) == 8


def test_errors_are_one_line(tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "few").mkdir()
  Image.new("RGB", (4, 4)).save(tmp_path / "few" / "a.png")
  (tmp_path / "few" / "note.txt").write_text("no image")
  for kwargs, error, words in (
    (dict(path=""), ValueError, "set data.sources.folder.path to a folder"),
    (dict(path=str(tmp_path / "none")), FileNotFoundError, "none does not exist"),
    (dict(path=str(tmp_path / "few" / "a.png")), FileNotFoundError, "is a file"),
    (dict(path=str(tmp_path / "empty")), ValueError, "has no jpg"),
    (dict(path=str(tmp_path / "few")), ValueError, "set data.sources.folder.val_path"),
    (dict(path=str(tmp_path / "few"), val_path=str(tmp_path / "few")), ValueError, "overlaps"),
    (dict(path=str(tmp_path), val_path=str(tmp_path / "few")), ValueError, "overlaps"),
  ):
    with pytest.raises(error, match=words) as caught:
      Folder("validation", **kwargs)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path, monkeypatch):
  write_classes(tmp_path / "a", count=5)
  whole = (tmp_path / "a" / "bird" / "2.png").read_bytes()
  (tmp_path / "a" / "bird" / "1.png").write_bytes(whole[:40])  # truncated
  (tmp_path / "a" / "bird" / "2.png").write_text("not an image")
  (tmp_path / "a" / "tree_frog" / "4.png").write_bytes(b"")
  cfg = dict(path=str(tmp_path / "a"), val_path=str(write_classes(tmp_path / "v")))
  source = Folder("train", **cfg)
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
  got = [base.read(source, i) for i in (*range(10), *range(10))]
  assert [skipped for _, skipped in got[:10]] == [0, 2, 1, 0, 0, 0, 0, 0, 0, 1]
  assert same_record(got[1][0], source[3]) and same_record(
    got[9][0], source[0]
  )  # the next readable one, wrapping around
  assert len(warnings) == 3 and "1.png" in warnings[0]  # each file is reported once


def test_sidecar_captions(tmp_path):
  write_classes(tmp_path / "a", count=6, classes=("tree_frog",))
  beside = tmp_path / "a" / "tree_frog"
  (beside / "0.txt").write_text("a frog\r\n\n  two  frogs \n", encoding="utf-8-sig")
  (beside / "1.json").write_text(json.dumps({"caption": "ein Fr\u00f6schlein", "id": 3}), encoding="utf-8")
  (beside / "2.json").write_text(json.dumps({"captions": ["one\nfrog", "", "green"]}))
  (beside / "3.txt").write_text("from the text")
  (beside / "3.json").write_text("never read")
  (beside / "note.txt").write_text("of no picture")
  cfg = dict(path=str(tmp_path / "a"), val_path=str(write_classes(tmp_path / "v")))
  source = Folder("train", **cfg)
  want = [
    ("a frog", "two frogs"),
    ("ein Fr\u00f6schlein",),
    ("one frog", "green"),
    ("from the text",),
    ("tree frog",),
    ("tree frog",),
  ]
  records = [base.read(source, i)[0] for i in range(6)]
  assert [r["captions"] for r in records] == want
  assert [r["caption"] for r in records] == [c[0] for c in want] and {r["label"] for r in records} == {0}


@pytest.mark.parametrize(
  "name,data,words",
  [
    pytest.param("0.txt", b"caf\xe9", "utf-8", id="latin-1"),
    pytest.param("0.txt", b"", "no caption", id="empty"),
    pytest.param("0.txt", b" \n\n", "no caption", id="blank"),
    pytest.param("0.txt", b"x" * (MAX_CAPTION_BYTES + 1), "more than 1000000 bytes", id="huge"),
    pytest.param("0.json", b"", "Expecting value", id="empty-json"),
    pytest.param("0.json", b"\xff{}", "utf-8", id="binary-json"),
    pytest.param("0.json", b"[" * 100_000, "recursion", id="deep"),
    pytest.param("0.json", b'{"captions": []}', "no caption", id="none"),
    pytest.param("0.json", b'{"captions": "a"}', "neither", id="text-for-list"),
    pytest.param("0.json", b'{"caption": 3}', "neither", id="number"),
    pytest.param("0.json", b'{"text": "a"}', "neither", id="other-key"),
    pytest.param("0.json", b'["a"]', "neither", id="list"),
  ],
)
def test_damaged_captions(tmp_path, name, data, words):
  write_classes(tmp_path / "a", count=2, classes=("bird",))
  (tmp_path / "a" / "bird" / name).write_bytes(data)
  cfg = dict(path=str(tmp_path / "a"), val_path=str(write_classes(tmp_path / "v")))
  source = Folder("train", **cfg)
  with pytest.raises(base.UnreadableRecord, match=f"bird/{name}: .*{words}") as caught:
    source[0]
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
  assert base.read(source, 0)[1] == 1  # skipped, as an unreadable image would be


def test_no_readable_files(tmp_path):
  (tmp_path / "a").mkdir()
  for i in range(30):
    (tmp_path / "a" / f"{i}.jpg").write_text("broken")
  cfg = dict(path=str(tmp_path / "a"), val_path=str(write_classes(tmp_path / "v")))
  with pytest.raises(ValueError, match="20 consecutive images are unreadable"):
    base.read(Folder("train", **cfg), 0)


def test_a_damaged_file_is_unreadable_at_any_size(tmp_path):
  source = Folder("train", str(write_damaged_jpegs(tmp_path)), str(tmp_path / "validation"))
  for crop in (transforms.to_rgb, lambda file: transforms.center_crop(file, 32, True)):
    for index, words in ((3, "3.jpg: .*truncated"), (6, "6.jpg: ")):
      with pytest.raises(base.UnreadableRecord, match=words):
        source.view(index, crop)
