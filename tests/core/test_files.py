"""Text files, names in messages, and atomic file writes."""

import os
from pathlib import Path

import pytest

from flextok_jax.core import files


def test_writes_are_atomic(tmp_path):
  (tmp_path / "taken").mkdir()
  with pytest.raises(ValueError, match="cannot write"):
    files.write_file(tmp_path / "taken", b"x")
  with pytest.raises(ValueError, match="cannot write"):
    (tmp_path / "file").write_text("old")
    files.write_file(tmp_path / "file" / "below", b"x")
  files.write_file(tmp_path / "file", b"new")
  assert (tmp_path / "file").read_bytes() == b"new"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


@pytest.mark.parametrize(
  "data,want",
  [
    (b"a\nb\n", ["a", "b"]),
    (b"\xef\xbb\xbfa\r\nb", ["a", "b"]),
    (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "b"]),  # two files joined
    ("a\u2028b\x85c\x0b\x1cd\re\n".encode(), ["a\u2028b\x85c\x0b\x1cd\re"]),
    (b"", [""]),
  ],
)
def test_text_files(tmp_path, data, want):
  (tmp_path / "a.txt").write_bytes(data)
  assert files.lines(files.read_text(tmp_path / "a.txt")) == want


@pytest.mark.parametrize(
  "data,words",
  [
    ("café".encode("cp1252"), "line 1 has the byte 0xe9: .*Windows-1252"),
    (b"a\n\xff", "line 2 has the byte 0xff"),
    ("a".encode("utf-16"), "is text in UTF-16: save it as UTF-8"),
    ("a".encode("utf-32"), "is text in UTF-32"),
    ("a".encode("utf-16-le"), "zero byte: .*UTF-16"),
    (b"x" * 101, "more than 100 bytes"),
  ],
)
def test_other_texts_are_named(tmp_path, data, words):
  (tmp_path / "a.txt").write_bytes(data)
  with pytest.raises(ValueError, match=f"a.txt .*{words}") as caught:
    files.read_text(tmp_path / "a.txt", 100)
  assert "\n" not in str(caught.value)
  with pytest.raises(ValueError, match="cannot be read: Is a directory"):
    files.read_text(tmp_path)
  with pytest.raises(FileNotFoundError, match="prompts_file=b does not exist"):
    files.read_text(tmp_path / "b", name="prompts_file=b")


def test_names_in_messages():
  assert files.printable("a/é.png") == "a/é.png"
  assert files.printable(os.fsdecode(b"caf\xe9\n\x1b[2J.png")) == "caf\\xe9\\n\\x1b[2J.png"


def test_only_regular_files_are_read(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for path, kind in ((tmp_path / "pipe", "FIFO"), ("/dev/zero", "device"), (tmp_path, "folder")):
    with pytest.raises(OSError, match=f"is a {kind}, not a regular file"):
      files.check_regular(path)


def test_temporary_files_are_private_and_those_of_killed_runs_are_cleared(tmp_path):
  path = tmp_path / ("n" * 250)
  killed, other = (tmp_path / f".{name}.0123abcd.tmp" for name in (files.shorten(path.name), "other"))
  with files.replacing(path) as one, files.replacing(path) as two:
    assert one != two
    one.write_text("one"), two.write_text("two"), killed.write_text("x"), other.write_text("x")
    files.clear_leftovers(tmp_path, [path.name])
    assert set(tmp_path.iterdir()) == {one, two, other}
  assert path.read_text() == "one" and set(tmp_path.iterdir()) == {path, other}
  with pytest.raises(KeyError), files.replacing(path) as one:
    raise KeyError
  files.clear_leftovers(tmp_path)
  assert set(tmp_path.iterdir()) == {path}
  files.write_new_file(path, b"late")
  assert path.read_text() == "one" and set(tmp_path.iterdir()) == {path}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("elsewhere", path)])
def test_only_regular_files_are_locked(tmp_path, make):
  make(tmp_path / ".lock")
  with pytest.raises(ValueError, match="lock is not a regular file: delete it"):
    files.open_regular(tmp_path / ".lock")


def test_names_are_shortened_and_made_text():
  assert files.shorten("é" * 150) == "é" * 100 and files.shorten("a") == "a"
  name = os.fsdecode(b"caf\xe9.png")
  assert files.as_text(name) == "caf\\xe9.png" and files.as_text("é") == "é"


def test_folders_are_tried_for_writing(tmp_path):
  files.check_writable(tmp_path / "new" / "deep")
  assert not list(tmp_path.iterdir())
  (tmp_path / "file").write_text("x")
  for folder, reason in ((tmp_path / "file" / "x", ".*file is a file"), (Path("/proc/x"), "")):
    with pytest.raises(ValueError, match=f"cannot write {folder}: {reason}"):
      files.check_writable(folder)
