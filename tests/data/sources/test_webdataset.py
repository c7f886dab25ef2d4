"""WebDataset tar files: samples, patterns, splits, order, and damaged archives."""

import gzip
import itertools
import json
import os
import pickle
import random
import re
import tarfile

import numpy as np
import pytest

from flextok_jax.config import derive
from flextok_jax.data import pipeline
from flextok_jax.data.sources import base
from flextok_jax.data.sources.webdataset import WebDataset, find_tars
from flextok_jax.training.inputs import image_data
from tests.support import source_mutants
from tests.support.tars import archive, picture, shard, write_shards


def read(source) -> list[tuple]:
  """Returns (value, label, captions) of all records."""
  records = [source[i] for i in range(len(source))]
  return [(r["image"].getpixel((0, 0))[0], r["label"], r["captions"]) for r in records]


def opened(folder, data: bytes, *args) -> WebDataset:
  """Returns a source of one tar file with another one for validation."""
  for name, content in (("a.tar", data), ("v.tar", shard(0))):
    (folder / name).write_bytes(content)
  return WebDataset("train", f"{folder}/a.tar", f"{folder}/v.tar", *args)


def test_samples(tmp_path):
  write_shards(tmp_path / "v", 1)
  for path in (write_shards(tmp_path / "a"), f"{tmp_path}/a", f"{tmp_path}/a/*.tar", f"{tmp_path}/a/0000{{0,1,2}}.tar"):
    source = WebDataset("train", path, f"{tmp_path}/v/00000.tar")
    assert read(source) == [(i, i % 10, (f"number {i}",)) for i in range(12)]
  assert read(pickle.loads(pickle.dumps(source))) == read(source)
  assert source.view(3, np.size, with_captions=False)["captions"] == ("",)
  assert len(WebDataset("validation", path, f"{tmp_path}/v/00000.tar")) == 4


def test_splits_are_fixed_and_disjoint(tmp_path):
  path = write_shards(tmp_path, 12, 10)
  train, validation = (WebDataset(split, path) for split in ("train", "validation"))
  found = [{value for value, *_ in read(source)} for source in (train, validation)]
  assert found[0] | found[1] == set(range(120)) and not found[0] & found[1] and 1 <= len(found[1]) <= 15
  assert {value for value, *_ in read(WebDataset("validation", str(tmp_path)))} == found[1]


def test_batches_are_those_of_any_number_of_processes_and_resume(tmp_path):
  path = write_shards(tmp_path, 12, 10)
  data = image_data(
    derive(data=dict(num_threads=2, sources=dict(tfds=dict(weight=0.0), webdataset=dict(weight=1.0, path=path))))
  )
  batches = lambda **local: pipeline.train_batches(data, global_batch=8, image_size=8, seed=3, **local)
  whole = [batch["image"] for batch in itertools.islice(batches(), 4)]
  for step, index in ((0, 0), (0, 1), (2, 1)):
    part = next(batches(start_step=step, process_index=index, process_count=2))
    np.testing.assert_array_equal(part["image"], whole[step][4 * index : 4 * index + 4])
    assert not part["unreadable"].any()


def test_what_archives_hold(tmp_path, warnings):
  link = tarfile.TarInfo("link.png")
  link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
  folder = tarfile.TarInfo("x/")
  folder.type = tarfile.DIRTYPE
  long = "x/" + "n" * 300
  members = [
    *(folder, link, ("x/1.PNG", picture(1)), ("x/2.seg.png", picture(99)), ("x/2.jpg", picture(2, "JPEG"))),
    *(("x/1.json", json.dumps({"caption": "one", "label": 5}).encode()), ("x/2.json", b'{"text": "two"}')),
    *((f"{long}.png", picture(3)), (f"{long}.txt", b"three\nlines\n"), ("x/4.npy", b""), ("x/5.txt", b"alone")),
    *(("x/._1.png", b"mac"), ("__MACOSX/1.png", b"mac"), ("x/6.png", picture(6)), ("x/6.cls", b"cat")),
    *(("../../7.png", picture(7)), ("x/8.png", picture(8)), ("x/8.txt", "caf\u00e9".encode("cp1252"))),
  ]
  want = [
    (1, 5, ("one",)),
    (2, -1, ("two",)),
    (3, -1, ("three", "lines")),
    (6, -1, ("",)),
    (7, -1, ("",)),
    (8, -1, ("",)),
  ]
  for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
    assert read(opened(tmp_path, archive(members, form))) == want
  for words in (
    "left out of .*: 2 hidden files, 1 links or devices, 1 .npy, 1 further .seg.png of samples with a .jpg, 1 samp",
    "labels like 'cat' of .*a.tar/x/6 are no numbers",
    "No caption in .*a.tar/x/8.txt: it is no text in UTF-8",
  ):
    assert sum(bool(re.search(words, line)) for line in warnings) == 1, (words, warnings)


def test_fields_of_json_files(tmp_path):
  fields = json.dumps({"caption": "a", "blip": "b", "kind": "3"}).encode()
  source = opened(tmp_path, archive([("1.png", picture(1)), ("1.json", fields), ("1.txt", b"c")]), "blip", "kind")
  assert read(source) == [(1, 3, ("b",))]


def test_joined_archives_are_read_to_the_end(tmp_path):
  source = opened(tmp_path, shard(0) + shard(4) + shard(0))  # names repeat in the third
  assert [value for value, *_ in read(source)] == [*range(8), *range(4)]


@pytest.mark.parametrize(
  "change,words",
  [
    (lambda data: data[:6300], "ends within a header, at byte 6144: the 2 samples before are read"),
    (lambda data: data[:6700], "ends within a file of .* bytes, at byte 6144: the 2 samples"),
    (lambda data: data[:6144], "has no mark of its end, so it may be incomplete: the 2 samples"),
    (lambda data: data[:6144] + b"x" + data[6145:], "has a damaged header, at byte 6144: the 2 samples"),
    (lambda data: data + bytes(2**20) + b"x", "bytes after its end"),
  ],
)
def test_damaged_archives_are_read_up_to_the_damage(tmp_path, warnings, change, words):
  source = opened(tmp_path, change(shard(0)))
  assert read(source) == [(i, i, (f"number {i}",)) for i in range(len(source))] and len(source) >= 2
  assert re.search(words, warnings[0]) and len(warnings) == 1


@pytest.mark.parametrize(
  "data,words",
  [
    (b"", "is empty: replace it"),
    (b"x" * 2000, "is no tar archive"),
    (b"x" * 20, "ends within a header"),
    (gzip.compress(shard(0)), "is compressed by gzip, without random access: decompress it"),
    (archive([("1.txt", b"alone")]), "no picture .1 samples without a picture"),
    (archive([]), "no picture .it is empty"),
  ],
)
def test_archives_that_are_refused(tmp_path, data, words):
  with pytest.raises(ValueError, match=words) as caught:
    opened(tmp_path, data)
  assert "\n" not in str(caught.value)


def test_sizes_that_archives_claim_are_not_believed(tmp_path):
  header = bytearray(shard(0)[:512])

  def sized(field: bytes, kind: bytes = b"0") -> bytes:
    header[124:136], header[156:157], header[148:156] = field, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + shard(0)[512:]

  for data in (
    sized(b"\x80" + b"\xff" * 11),
    sized(b"77777777777\0"),
    sized(b"\xff" * 12),
    sized(b"-0000000001\0"),
    sized(b"77777777777\0", b"L"),
    sized(b"77777777777\0", b"x"),
    sized(b"00000000777\0", b"S"),
  ):
    with pytest.raises(ValueError, match="a.tar (ends within|has a (damaged header|name|sparse file)|is no tar)"):
      opened(tmp_path, data)


def test_patterns(tmp_path, warnings):
  write_shards(tmp_path, 12)
  (tmp_path / "0.tgz").write_bytes(b"")
  (tmp_path / "99999.tar").mkdir()
  os.mkfifo(tmp_path / "pipe.tar")
  names = lambda pattern: [int(os.path.basename(path)[:5]) for path in find_tars(f"{tmp_path}/{pattern}")]
  assert names("") == [*range(12)] and names("{00008..00011}.tar") == [8, 9, 10, 11]
  assert names("{00009,00001}.tar") == [9, 1] and names("000{0..1}{1..1}.tar".replace("000{", "000{")) == [1, 11]
  assert "1 .tgz, 1 folders, 1 not regular files" in warnings[0]
  for pattern, error, words in (
    ("{00000..00012}.tar", FileNotFoundError, "00012.tar does not exist"),
    ("{00002..00001}.tar", ValueError, "empty range"),
    ("{0..999999999999}.tar", ValueError, "names 1000000000000 files: at most"),
    ("{0..99999}{0..99999}.tar", ValueError, "at most 1000000"),
    ("0000{0,0}.tar", ValueError, "names a tar file twice"),
    ("pipe.tar", ValueError, "is a FIFO, not a regular file"),
    ("99999.tar/", FileNotFoundError, "has no .tar file"),
  ):
    with pytest.raises(error, match=words):
      find_tars(f"{tmp_path}/{pattern}")
  with pytest.raises(ValueError, match="set data.sources.webdataset.path"):
    WebDataset("train", "")
  with pytest.raises(ValueError, match="path and val_path both have .*00003.tar"):
    WebDataset("train", str(tmp_path), f"{tmp_path}/00003.tar")
  few = [len(WebDataset(split, f"{tmp_path}/00000.tar")) for split in ("train", "validation")]
  assert min(few) == 1  # a split is never empty


@pytest.mark.parametrize("kind", ["tars", "texts"])
def test_mutants(tmp_path, kind, warnings):
  for number in range(100):
    folder = tmp_path / str(number)
    folder.mkdir()
    try:
      getattr(source_mutants, kind)(random.Random(number), folder)
    except (ValueError, base.UnreadableRecord) as error:
      assert "\n" not in str(error) and len(str(error)) < 1000
  assert all("\n" not in line and len(line) < 1000 for line in warnings)
