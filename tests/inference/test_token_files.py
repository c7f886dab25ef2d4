"""Token files: reading, and one-line errors."""

import dataclasses
import json
import os
import random
import zipfile

import numpy as np
import pytest

from flextok_jax.core import files, npz
from flextok_jax.inference import token_files
from tests.support import token_mutants

NUM_CODES = 8 * 5 * 5
FACTS = token_files.Facts("f0", 16, 4)


def write(path, **fields):
  path.write_text(json.dumps(fields))
  return path


@pytest.mark.parametrize(
  "pattern, fields",
  [
    (r"token_ids\[1\]\[2\] is 200, this model's ids are 0 to 199", dict(token_ids=[[0], [1, 2, 200]])),
    (r"token_ids\[0\]\[0\] is -1,", dict(token_ids=[[-1]])),
    (r"token_ids\[0\]\[0\] is 1.0,", dict(token_ids=[[1.0]])),
    (r"token_ids\[0\]\[0\] is True,", dict(token_ids=[[True]])),
    (r"token_ids\[0\]\[0\] is '1',", dict(token_ids=[["1"]])),
    (r"token_ids\[1\] has 0 tokens, this model takes 1 to 4", dict(token_ids=[[1], []])),
    (r"token_ids\[0\] has 5 tokens, this model takes 1 to 4", dict(token_ids=[[1, 2, 3, 4, 5]])),
    ("must be a list of one or more lists", dict(token_ids=[])),
    ("must be a list of one or more lists", dict(token_ids=[1, 2])),
    ("has no 'token_ids'", dict(ids=[[1]])),
    ("2 names for 1 token", dict(token_ids=[[1]], names=["a", "b"])),
    (r"'names' must be a list of strings, but names\[1\] is 3", dict(token_ids=[[1]] * 2, names=["a", 3])),
    (r"names\[1\] is 'a.x00b', which cannot be part of a file's name", dict(token_ids=[[1]] * 2, names=["a", "a\0b"])),
    (r"names\[0\] is '.ud800', which cannot", dict(token_ids=[[1]], names=["\ud800"])),
    (r"token_ids\[0\]\[0\] is 'xxx", dict(token_ids=[["x" * 300_000]])),
    ("tokens of 'xxx", dict(token_ids=[[1]], image_size="x" * 300_000)),
    ("'names' must be a list of strings, not 'xxx", dict(token_ids=[[1]], names="x" * 300_000)),
    ("tokens of 32 px images, but this checkpoint makes 16 px", dict(token_ids=[[1]], image_size=32)),
    ("'sizes' must be a list of .height, width., one for each of 2", dict(token_ids=[[1]] * 2, sizes=[[16, 16]])),
    (
      r"sizes\[1\] is \[16, 0\], not .height, width. of 1 to 4096",
      dict(token_ids=[[1]] * 2, sizes=[[16, 16], [16, 0]]),
    ),
    (r"sizes\[0\] is \[16, True\], not", dict(token_ids=[[1]], sizes=[[16, True]])),
    (r"sizes\[0\] is 16, not", dict(token_ids=[[1]], sizes=[16])),
    ("ids of the tokenizer 'abc', but this checkpoint is f0", dict(token_ids=[[1]], tokenizer="abc")),
  ],
)
def test_invalid_token_files(pattern, fields, tmp_path):
  with pytest.raises(ValueError, match=pattern) as caught:
    token_files.read_tokens(write(tmp_path / "t.json", **fields), FACTS, NUM_CODES)
  assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_damaged_token_files(tmp_path):
  def read(path):
    return token_files.read_tokens(path, FACTS, NUM_CODES)

  bad, whole = tmp_path / "t.json", token_files.to_json(FACTS, [("a", [1, 2, 3, 4]), ("b", [5, 6])])
  for content in (b"", b"{", b"\xff\xfe", whole[:-20], b"[" * 100_000):
    bad.write_bytes(content)
    with pytest.raises(ValueError, match="not a complete .json token file"):
      read(bad)
  bad.write_text("[[1, 2]]")
  with pytest.raises(ValueError, match="must hold an object"):
    read(bad)

  archive = tmp_path / "t.npz"
  token_files.write_tokens(archive, dataclasses.replace(FACTS, num_tokens=2), [("a", [1, 2]), ("b", [3, 4])])
  names, ids, sizes = read(archive)
  assert sizes is None and names == ["a", "b"] and np.array_equal(ids, [[1, 2], [3, 4]])
  whole = archive.read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(100):  # truncated, or one wrong byte: a one-line error or, if the byte has no effect, the same tokens
    if rng.random() < 0.5:
      archive.write_bytes(whole[: rng.integers(len(whole))])
    else:
      place = rng.integers(len(whole))
      archive.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
    try:
      assert np.array_equal(read(archive)[1], [[1, 2], [3, 4]])
    except ValueError as e:
      assert len(str(e).splitlines()) == 1
  np.savez(archive, token_ids=np.array([[1], [2, 3]], object))
  with pytest.raises(ValueError, match="not a complete .npz file"):
    read(archive)


def test_json_files_are_bounded(tmp_path, monkeypatch):
  """A file of the largest size that may be written is read."""
  path = tmp_path / "t.json"
  content = token_files.to_json(dataclasses.replace(FACTS, num_tokens=2), [("a", [199, 199]), ("b", [1, 2])])
  path.write_bytes(content)
  monkeypatch.setattr(token_files, "MAX_JSON", len(content) - 1)
  with pytest.raises(ValueError, match=f"has {len(content)} bytes, .* at most {len(content) - 1}: write it as .npz$"):
    token_files.read_tokens(path, FACTS, NUM_CODES)
  with pytest.raises(ValueError, match="out=.*t.json would have up to .*: write FILE.npz"):
    token_files.check_json_size(path, ["a" * 30, "b" * 30], 4, NUM_CODES)
  token_files.check_json_size(tmp_path / "t.npz", ["a" * 30, "b" * 30], 4, NUM_CODES)
  token_files.check_json_size(path, ["a"], 2, NUM_CODES)


def test_names_of_files_become_parts_of_names_of_files(tmp_path):
  names = ["n" * 300 + ".png", "é" * 127, os.fsdecode(b"caf\xe9.png"), "a\nb", "", "..", "x/../y.z"]
  path = write(tmp_path / "t.json", token_ids=[[1]] * len(names), names=names)
  for name in token_files.read_tokens(path, FACTS, NUM_CODES)[0]:
    files.write_file(tmp_path / f"00000_{token_files.file_stem(name)}.png", b"x")


def test_npz_files_expand_within_bounds(tmp_path, monkeypatch):
  path = tmp_path / "t.npz"
  read = lambda: token_files.read_tokens(path, FACTS, NUM_CODES)
  np.savez_compressed(path, token_ids=np.zeros((10**6, 4), np.int32))
  with pytest.raises(ValueError, match=r"not a complete .npz file .*token_ids has shape \[1000000, 4\]"):
    read()  # more images than bytes
  monkeypatch.setattr(npz, "MAX_EXPANDED", 10**5)
  np.savez_compressed(path, token_ids=np.zeros((100, 10**5), np.uint8))
  with pytest.raises(ValueError, match="token_ids expands from .* to 10000128 bytes: write it uncompressed"):
    read()
  np.savez(path, token_ids=np.zeros((9, 4), ">u2"), names=np.array(list("abcdefghi")))
  assert read()[0] == list("abcdefghi") and np.array_equal(read()[1], np.zeros((9, 4)))
  for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    with zipfile.ZipFile(path, "w", method) as archive:
      archive.writestr("token_ids.npy", b"x" * 1000)
    with pytest.raises(ValueError, match="token_ids is compressed by another method than deflate"):
      read()
  np.savez(path, token_ids=np.zeros((1, 4), int))
  data = path.read_bytes()
  path.write_bytes(data.replace(b"(1, 4)", b"(1, 4\n"))  # tokenize, which numpy's reader calls, has errors of its own
  with pytest.raises(ValueError, match="not a complete .npz file"):
    read()


@pytest.mark.parametrize("kind", ["token_file", "npz", "shards"])
def test_mutants_are_read_or_refused_in_one_line(kind, tmp_path):
  for number in range(150):
    folder = tmp_path / str(number)
    folder.mkdir()
    try:
      getattr(token_mutants, kind)(random.Random(number), folder)
    except (ValueError, FileNotFoundError) as e:
      assert len(str(e).splitlines()) == 1 and len(str(e)) < 1000
