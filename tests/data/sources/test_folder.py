"""Folders: classes, splits, sidecar captions, unreadable files and error messages."""

import json
import os
import re
import socket

from PIL import Image
import pytest

from flextok_jax.data import transforms
from flextok_jax.data.sources import base, captions
from flextok_jax.data.sources.folder import Folder
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
    (dict(path=str(tmp_path / "empty")), ValueError, "has no picture"),
    (dict(path=str(tmp_path / "few")), ValueError, "set data.sources.folder.val_path"),
    (dict(path=str(tmp_path / "few"), val_path=str(tmp_path / "few")), ValueError, "overlaps"),
    (dict(path=str(tmp_path), val_path=str(tmp_path / "few")), ValueError, "overlaps"),
  ):
    with pytest.raises(error, match=words) as caught:
      Folder("validation", **kwargs)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path, warnings):
  write_classes(tmp_path / "a", count=5)
  whole = (tmp_path / "a" / "bird" / "2.png").read_bytes()
  (tmp_path / "a" / "bird" / "1.png").write_bytes(whole[:40])  # truncated
  (tmp_path / "a" / "bird" / "2.png").write_text("not an image")
  (tmp_path / "a" / "tree_frog" / "4.png").write_bytes(b"")
  cfg = dict(path=str(tmp_path / "a"), val_path=str(write_classes(tmp_path / "v")))
  source = Folder("train", **cfg)
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
  (beside / "5.JSON").write_text('{"text": "in capitals"}')
  (beside / "note.txt").write_text("of no picture")
  cfg = dict(path=str(tmp_path / "a"), val_path=str(write_classes(tmp_path / "v")))
  source = Folder("train", **cfg)
  want = [
    ("a frog", "two frogs"),
    ("ein Fr\u00f6schlein",),
    ("one frog", "green"),
    ("from the text",),
    ("tree frog",),
    ("in capitals",),
  ]
  records = [base.read(source, i)[0] for i in range(6)]
  assert [r["captions"] for r in records] == want
  assert [r["caption"] for r in records] == [c[0] for c in want] and {r["label"] for r in records} == {0}


@pytest.mark.parametrize(
  "name,data,words",
  [
    pytest.param("0.txt", b"caf\xe9", "tree_frog/0.txt: it is no text in UTF-8, .* 0xe9.*Windows-1252", id="cp1252"),
    pytest.param("0.txt", "a bird".encode("utf-16"), "0.txt: it is text in UTF-16", id="utf-16"),
    pytest.param("0.txt", b"", "files like .*0.txt are empty", id="empty"),
    pytest.param("0.txt", b" \n\n", "are empty", id="blank"),
    pytest.param("0.txt", b"0 0.5 0.5 0.25 0.1\r\n13 1e-3 0 1 1\n", "boxes of objects", id="yolo"),
    pytest.param("0.txt", b"x" * (captions.MAX_BYTES + 1), "more than 1000000 bytes", id="huge"),
    pytest.param("0.json", b"", "are empty", id="empty-json"),
    pytest.param("0.json", b"\xff{}", "0xff", id="binary-json"),
    pytest.param("0.json", b"[" * 100_000, "recursion", id="deep"),
    pytest.param("0.json", b'{"captions": []}', "have no 'captions' or 'caption'", id="none"),
    pytest.param("0.json", b'{"caption": null}', "have no 'captions'", id="null"),
    pytest.param("0.json", b'{"caption": 3}', "have no 'captions'", id="number"),
    pytest.param("0.json", b'{"version": "5.4", "shapes": [], "imagePath": "0.png"}', "have no", id="labelme"),
    pytest.param("0.json", b'["a"]', "have no 'captions'", id="list"),
  ],
)
def test_files_that_are_no_captions(tmp_path, warnings, name, data, words):
  write_classes(tmp_path / "a", count=2, classes=("tree_frog",))
  (tmp_path / "a" / "tree_frog" / name).write_bytes(data)
  source = Folder("train", str(tmp_path / "a"), str(write_classes(tmp_path / "v")))
  source.view(0, transforms.to_rgb, with_captions=False)
  assert not warnings  # not even read
  record, skipped = base.read(source, 0)
  assert record["captions"] == ("tree frog",) and skipped == 0
  assert len(warnings) == 1 and re.search(words, warnings[0]) and "\n" not in warnings[0] and len(warnings[0]) < 400
  assert base.read(source, 0)[0]["captions"] == ("tree frog",) and len(warnings) == 1  # each is reported once


def test_only_regular_files(tmp_path, warnings, monkeypatch):
  folder = write_classes(tmp_path / "a", count=2, classes=("bird",)) / "bird"
  os.mkfifo(folder / "pipe.png")
  os.mkfifo(folder / "0.txt")
  (folder / "1.txt").symlink_to("/dev/zero")
  (folder / "loop.png").symlink_to("loop.png")
  (folder / "gone.png").symlink_to("nowhere")
  (folder / "sub.png").mkdir()
  with socket.socket(socket.AF_UNIX) as server:
    monkeypatch.chdir(folder)  # paths of sockets are short
    server.bind("s.jpg")
  source = Folder("train", str(tmp_path / "a"), str(write_classes(tmp_path / "v")))
  assert [source[i]["captions"] for i in range(len(source))] == [("bird",)] * 2
  assert "6 not regular files" in warnings[0]


def test_the_size_of_a_file_is_looked_at_first(tmp_path):
  folder = write_classes(tmp_path / "a", count=2, classes=("bird",))
  os.truncate(folder / "bird" / "1.png", base.MAX_BYTES + 1)
  source = Folder("train", str(folder), str(write_classes(tmp_path / "v")))
  with pytest.raises(base.UnreadableRecord, match="1.png: has 1073741825 bytes: image files have at most"):
    source[1]


def test_what_is_left_out_is_counted(tmp_path, warnings):
  folder = write_classes(tmp_path / "a", count=1, classes=("bird", "fish"))
  Image.new("RGB", (4, 4)).save(folder / "bird" / "1.TIF", "TIFF")
  Image.new("RGB", (4, 4)).save(folder / "bird" / "2.jfif", "JPEG")
  for name in ("a.heic", "b.heic", "c.HEIC", "d.psd", "e", ".DS_Store", "0.txt", "9.txt"):
    (folder / "bird" / name).write_bytes(b"a bird")
  for name in ("@eaDir", "__MACOSX", ".git"):
    write_classes(folder / name, count=1)
  source = Folder("train", str(folder), str(write_classes(tmp_path / "v")))
  assert len(source) == 4 and source.class_names == ("bird", "fish")
  (line,) = warnings
  for part in (
    "3 .heic",
    "1 .psd",
    "1 without extension",
    "1 .txt",
    "1 hidden files",
    "1 @eaDir folders",
    "1 hidden f",
  ):
    assert part in line
  (tmp_path / "raw").mkdir()
  (tmp_path / "raw" / "a.CR2").write_bytes(b"")
  with pytest.raises(ValueError, match="raw has no picture .*1 .cr2"):
    Folder("train", str(tmp_path / "raw"))


def test_classes_are_numbered_in_natural_order(tmp_path, warnings):
  write_classes(tmp_path / "a", count=1, classes=tuple(map(str, range(12))))
  source = Folder("train", str(tmp_path / "a"), str(write_classes(tmp_path / "v", count=1, classes=("2", "x"))))
  assert [source[i]["label"] for i in range(12)] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
  validation = Folder("validation", str(tmp_path / "a"), str(tmp_path / "v"))
  assert [validation[i]["label"] for i in range(2)] == [2, -1]
  assert [words in line for words, line in zip(("natural order, as 2 before 10", "classes that .* (x)"), warnings)][0]
  assert "1 pictures of" in warnings[1] and "(x)" in warnings[1] and len(warnings) == 2


def test_empty_classes_keep_their_numbers(tmp_path, warnings):
  write_classes(tmp_path / "a", count=1, classes=("ant", "cat"))
  (tmp_path / "a" / "bee").mkdir()
  source = Folder("train", str(tmp_path / "a"), str(write_classes(tmp_path / "v", 1, classes=("ant", "bee", "cat"))))
  assert source.class_names == ("ant", "bee", "cat") and source[1]["label"] == 2
  assert "1 classes have no picture, and keep their numbers: bee" in warnings[0]


def test_names_of_any_bytes(tmp_path, warnings):
  folder = os.fsencode(tmp_path / "a")
  for name in (b"caf\xe9", "cafe\u0301".encode(), "caf\u00e9".encode()):
    os.makedirs(folder + b"/" + name)
    for file in (name, b"x\xff\n", b"n" * 250):
      Image.new("RGB", (4, 4)).save(open(folder + b"/" + name + b"/" + file + b".png", "wb"), "PNG")  # noqa: SIM115
  open(folder + b"/caf\xe9/x\xff\n.png", "wb").close()
  source = Folder("train", str(tmp_path / "a"), str(write_classes(tmp_path / "v", 1, classes=("cafe\u0301",))))
  records = [base.read(source, i)[0] for i in range(9)]
  assert sorted({(r["label"], r["caption"]) for r in records}) == [(0, "caf\u00e9"), (1, "caf\\xe9")]
  assert any("/caf\\xe9/x\\xff\\n.png: " in line for line in warnings)
  assert Folder("validation", str(tmp_path / "a"), str(tmp_path / "v"))[0]["label"] == 0


def test_links_to_one_folder_are_classes_of_their_own(tmp_path):
  store = write_classes(tmp_path / "store", count=60, size=(2, 2), classes=("x",)) / "x"
  (tmp_path / "a").mkdir()
  for name in ("ant", "bee"):
    (tmp_path / "a" / name).symlink_to(store)
  (tmp_path / "a" / "cat").mkdir()
  (tmp_path / "a" / "cat" / "0.png").symlink_to(store / "0.png")
  splits = [Folder(split, str(tmp_path / "a")) for split in ("train", "validation")]
  assert sum(map(len, splits)) == 121 and splits[0].class_names == ("ant", "bee", "cat")
  files = [{os.path.realpath(os.path.join(s._root, f)) for f in s._files} for s in splits]
  assert not files[0] & files[1]  # a picture that two classes share is in one split


def write_metadata(folder, rows, name="metadata.jsonl"):
  text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
  (folder / name).write_text(text, encoding="utf-8-sig")


def test_metadata_of_hugging_face(tmp_path, warnings):
  folder = write_classes(tmp_path / "a", count=4, classes=("images",))
  write_metadata(
    folder,
    [
      {"file_name": "images/0.png", "text": "a caf\u00e9", "label": 7},
      {"file_name": "./images\\\\1.png".replace("\\\\", "\\"), "text": "one\u2028line", "label": 0},
      {"file_name": "images/0.png", "text": "another", "label": 7},
      {"file_name": "../a/images/2.png", "text": None},
      {"file_name": "/etc/passwd", "text": "outside"},
      "{damaged",
    ],
  )
  source = Folder("train", str(folder), str(write_classes(tmp_path / "v")))
  records = [source[i] for i in range(4)]
  assert [r["captions"] for r in records] == [("a caf\u00e9", "another"), ("one line",), ("",), ("",)]
  assert [r["label"] for r in records] == [7, 0, -1, -1] and source.class_names == ()
  for words in (
    "1 lines cannot be read, the first is line 6",
    "2 rows name no picture",
    "2 pictures of .* have no row",
  ):
    assert any(re.search(words, line) for line in warnings), (words, warnings)


def test_metadata_as_csv(tmp_path):
  folder = write_classes(tmp_path / "a", count=3, classes=("bird",)) / "bird"
  rows = ["file_name,blip,kind", '0.png,"a ""bird"",\ntwo lines",10_red', "1.png,b,2_green", "2.png,c,"]
  write_metadata(folder, rows, "metadata.csv")
  write_metadata(
    write_classes(tmp_path / "v", 1, classes=("x",)), ["file_name,blip,kind", "x/0.png,d,10_red"], "metadata.csv"
  )
  args = (str(tmp_path / "a"), str(tmp_path / "v"), "blip", "kind")
  source = Folder("train", *args)
  assert source.class_names == ("2_green", "10_red")
  assert [(source[i]["caption"], source[i]["label"]) for i in range(3)] == [
    ('a "bird", two lines', 1),
    ("b", 0),
    ("c", -1),
  ]
  validation = Folder("validation", *args)[0]
  assert (validation["caption"], validation["label"]) == ("d", 1)


@pytest.mark.parametrize(
  "rows,keys,words",
  [
    ([], ("", ""), "no row that can be read .it is empty"),
    (["{", "["], ("", ""), "no row that can be read .line 1"),
    ([{"image": "0.png"}], ("", ""), "no field file_name, .* its fields are image"),
    ([{"file_name": "0.png", "text": "a"}], ("prompt", ""), "no field caption_key='prompt': .* file_name, text"),
    ([{"file_name": "0.png", "text": "a"}], ("", "kind"), "no field label_key='kind'"),
  ],
)
def test_metadata_that_is_refused(tmp_path, rows, keys, words):
  folder = write_classes(tmp_path / "a", count=1, classes=("bird",))
  write_metadata(folder / "bird", rows)
  with pytest.raises(ValueError, match=f"metadata.jsonl has {words}"):
    Folder("train", str(folder), "", *keys)
  (folder / "bird" / "metadata.jsonl").write_bytes("caf\u00e9".encode("cp1252"))
  with pytest.raises(ValueError, match="metadata.jsonl is no text in UTF-8, as line 1 has the byte 0xe9"):
    Folder("train", str(folder))
  (folder / "bird" / "metadata.jsonl").unlink()
  with pytest.raises(ValueError, match="label_key='kind' needs a metadata.jsonl or metadata.csv"):
    Folder("train", str(folder), label_key="kind")


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
