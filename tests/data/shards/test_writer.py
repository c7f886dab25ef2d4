"""Writing token shards: deterministic output, resuming after interruptions."""

import os
import signal
import subprocess
import sys

import pytest

from flextok_jax.core import files
from flextok_jax.data import pipeline, transforms
from flextok_jax.data.shards.files import shard_name
from flextok_jax.data.shards.tokens import TokenShards
from flextok_jax.data.sources.folder import Folder
from flextok_jax.training.inputs import image_data
from tests.support.commands import ROOT
from tests.support.token_shards import IDS, SIZE, TOKENS, config, encode, records, write, write_folder


def test_records_match_the_source(pictures, written):
  source = Folder("train", str(pictures), str(pictures.parent / "validation"))
  read, meta = records(written), TokenShards(str(written)).meta
  assert len(read) == meta["num_records"] == 3 * 23 and meta["class_names"] == ["a", "b", "c"]
  assert (meta["fingerprint"], meta["num_ids"], meta["num_tokens"]) == ("0123456789abcdef", IDS, TOKENS)
  assert (meta["quality"], meta["metric"], meta["copies"]) == (0.1, "mse", 3)
  for i in range(23):
    copies, stored = read[3 * i : 3 * i + 3], source[i]
    ids, length = encode(transforms.center_crop(stored["image"], SIZE)[None])
    assert copies[0]["ids"] == ids[0].tolist() and copies[0]["length"] == length[0]
    for copy in copies:
      assert (copy["label"], copy["captions"], copy["num_objects"]) == (stored["label"], [stored["caption"]], -1)
  assert len({tuple(r["ids"]) for r in read}) > 60  # crops and flips differ
  assert [r["ids"] for r in records(written, "validation")] != [r["ids"] for r in read[:7]]
  assert sorted(p.name for p in (written / "train").iterdir()) == [
    "meta.json",
    "plan.json",
    *(f"tokens-0000{s}-of-00004.array_record" for s in range(4)),
  ]


def test_output_is_independent_of_shards_batches_and_threads(pictures, written, tmp_path):
  write(tmp_path, config(pictures, num_threads=0), copies=3, num_shards=3, batch_size=7)
  assert records(tmp_path) == records(written)
  write(tmp_path / "workers", config(pictures, num_workers=2), copies=3, num_shards=5)
  assert records(tmp_path / "workers") == records(written)
  write(tmp_path / "seed", config(pictures, seed=1), copies=2)
  other = records(tmp_path / "seed")
  assert other[::2] == records(written)[::3]  # the centre crops
  assert [r["ids"] for r in other[1::2]] != [r["ids"] for r in records(written)[1::3]]


def test_several_processes_write_the_same_as_one(pictures, written, tmp_path):
  kwargs = dict(copies=3, process_count=2)
  assert write(tmp_path, config(pictures), process_index=1, **kwargs) is None
  with pytest.raises(FileNotFoundError, match=r"meta.json is missing, so .* not complete: rerun"):
    TokenShards(str(tmp_path))
  meta = write(tmp_path, config(pictures), process_index=0, **kwargs)
  assert meta == TokenShards(str(written)).meta and records(tmp_path) == records(written)


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.support import token_shards as t
left = [int(sys.argv[3])]
def encode(images):
  left[0] -= 1
  if not left[0]:
    os.kill(os.getpid(), signal.SIGKILL)
  return t.encode(images)
t.write(sys.argv[1], t.config(Path(sys.argv[2])), encode, copies=3)
"""


def test_a_killed_run_resumes(pictures, written, tmp_path):
  args = [sys.executable, "-c", _KILLED, str(tmp_path), str(pictures), "14"]  # of 24 batches: within the third shard
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, check=False)
  assert done.returncode == -signal.SIGKILL, done.stderr.decode()
  there = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "train").glob("*.array_record")}
  assert sorted(there) == [shard_name("tokens", s, 4) for s in range(2)]
  calls = []
  write(tmp_path, config(pictures), lambda images: calls.append(1) or encode(images), copies=3)
  assert len(calls) == 12 and records(tmp_path) == records(written)
  assert not any(p.name.endswith(".tmp") for p in (tmp_path / "train").iterdir())
  assert all((tmp_path / "train" / name).stat().st_mtime_ns == time for name, time in there.items())
  # A shard truncated afterwards is written again, the others are not.
  damaged = tmp_path / "train" / shard_name("tokens", 3, 4)
  damaged.write_bytes(damaged.read_bytes()[:-1])
  calls.clear()
  write(tmp_path, config(pictures), lambda images: calls.append(1) or encode(images), copies=3)
  assert len(calls) == 6 and records(tmp_path) == records(written)
  # So is one with a hole, whose size and number of records are right.
  data = damaged.read_bytes()
  damaged.write_bytes(data[:200] + bytes(100) + data[300:])
  calls.clear()
  write(tmp_path, config(pictures), lambda images: calls.append(1) or encode(images), copies=3)
  assert len(calls) == 6 and records(tmp_path) == records(written)


def test_two_runs_at_once_lose_nothing(pictures, written, tmp_path):
  def write_twice(images):
    if not calls:
      calls.append(1)
      write(tmp_path, config(pictures), copies=3)  # another run, while this one is within its first shard
      leftover.write_bytes(b"of a killed run")
    return encode(images)

  calls, leftover = [], tmp_path / "train" / f".{shard_name('tokens', 1, 4)}.01234567.tmp"
  write(tmp_path, config(pictures), write_twice, copies=3)
  assert records(tmp_path) == records(written)
  write(tmp_path, config(pictures), copies=3)
  assert [p.name for p in (tmp_path / "train").iterdir() if p.name.startswith(".")] == []


def test_a_run_that_begins_at_the_same_time_with_other_settings_is_refused(pictures, tmp_path, monkeypatch):
  def begin(path, data, make=files.write_new_file):
    monkeypatch.undo()
    write(tmp_path, config(pictures, seed=1), copies=3)
    make(path, data)

  monkeypatch.setattr(files, "write_new_file", begin)
  with pytest.raises(ValueError, match="begun with other settings: seed is 1 there and 0 here"):
    write(tmp_path, config(pictures), copies=3)


@pytest.mark.parametrize("content", [None, "[" * 10**5, '{"shards": 0}', '{"shards": "%s"}' % ("x" * 10**5), "[]"])
def test_damaged_plans_are_one_short_line(pictures, tmp_path, content):
  (tmp_path / "train").mkdir()
  plan = tmp_path / "train" / "plan.json"
  os.mkfifo(plan) if content is None else plan.write_text(content)
  with pytest.raises(ValueError, match=r"plan.json cannot be read \(.*\): use another folder") as caught:
    write(tmp_path, config(pictures), num_shards=None)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
  "pattern, kwargs, data",
  [
    ("copies is 3 there and 2 here", dict(copies=2), {}),
    ("shards is 4 there and 5 here", dict(num_shards=5), {}),
    ("num_images is 23 there and 9 here", dict(num_images=9), {}),
    ("quality is 0.1 there and None here", dict(quality=None), {}),
    ("seed is 0 there and 1 here", {}, dict(seed=1)),
    ("crop is 'random' there and 'center' here", {}, dict(crop="center")),
    ("sources.folder.weight is 1.0 there and 2.0 here", {}, dict(sources=dict(folder=dict(weight=2.0)))),
  ],
  ids=lambda value: "" if isinstance(value, dict) else value.split()[0],
)
def test_resuming_with_other_settings_is_refused(pictures, written, pattern, kwargs, data):
  if "sources" in data:
    data = dict(sources=dict(folder=config(pictures).data.sources.folder.to_dict() | data["sources"]["folder"]))
  with pytest.raises(ValueError, match=rf"begun with other settings: {pattern}; use another folder") as caught:
    write(written, config(pictures, **data), **(dict(copies=3) | kwargs))
  assert "\n" not in str(caught.value)


def test_rerunning_on_a_complete_folder_does_nothing(pictures, written):
  before = {p: p.stat().st_mtime_ns for p in (written / "train").glob("*.array_record")}
  refuse = lambda images: pytest.fail("encoded again")
  meta = write(written, config(pictures), refuse, copies=3, num_shards=None)  # the existing number
  assert meta["num_records"] == 69 and all(p.stat().st_mtime_ns == t for p, t in before.items())


@pytest.mark.parametrize(
  "pattern, kwargs, data",
  [
    ("copies=0 must be at least 1", dict(copies=0), {}),
    ("num_shards=24 is more than the 23 images", dict(num_shards=24), {}),
    ("num_images=24 is out of range: folder has 1 to 23", dict(num_images=24), {}),
    ("num_images=0 is out of range", dict(num_images=0), {}),
    (
      "source 'synthetic' is endless: set num_images",
      {},
      dict(sources=dict(synthetic=dict(weight=1.0, render_size=16), folder=dict(weight=0.0))),
    ),
    ("copies=2 would be equal, because nothing augments folder", dict(copies=2), dict(crop="center", flip=False)),
    ("unknown crop 'middle'", {}, dict(crop="middle")),
  ],
  ids=["copies", "shards", "more", "none", "endless", "equal", "crop"],
)
def test_bad_settings_are_one_line(pictures, tmp_path, pattern, kwargs, data):
  with pytest.raises(ValueError, match=pattern) as caught:
    write(tmp_path / "out", config(pictures, **data), **kwargs)
  assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_unreadable_images_are_skipped(tmp_path, pictures):
  folder = write_folder(tmp_path / "train", 23)
  write_folder(tmp_path / "validation", 3)
  write(tmp_path / "whole", config(folder), num_shards=2)
  (folder / "b" / "04.png").write_text("broken")  # the tenth image overall
  meta = write(tmp_path / "one", config(folder), num_shards=2)
  whole = records(tmp_path / "whole")
  assert records(tmp_path / "one") == whole[:9] + whole[10:] and meta["shard_records"] == [10, 12]
  (folder / "b" / "07.png").write_text("broken")  # the eleventh
  with pytest.raises(ValueError, match=r"2 of 23 images are unreadable, .*max_unreadable=0.01: .*07"):
    write(tmp_path / "out", config(folder), num_shards=2)
  write(tmp_path / "out", config(folder, max_unreadable=0.1), num_shards=2)
  assert records(tmp_path / "out") == whole[:9] + whole[11:]


def test_mixtures_match_training_and_offset_class_numbers(pictures, tmp_path):
  sources = dict(
    folder=dict(config(pictures).data.sources.folder.to_dict(), weight=0.25),
    photos=dict(weight=0.25),
    synthetic=dict(weight=0.5, render_size=16),
  )
  cfg = config(pictures, sources=sources, crop="center", flip=False)
  meta = write(tmp_path, cfg, num_images=40)
  read = records(tmp_path)
  batch = next(pipeline.train_batches(image_data(cfg), global_batch=40, image_size=SIZE, seed=0))
  assert [r["ids"] for r in read] == encode(batch["image"])[0].tolist()
  assert [r["num_objects"] for r in read] == batch["num_objects"].tolist()
  names = meta["class_names"]
  assert names[:3] == ["a", "b", "c"] and "circle" in names[3:]
  for record, label in zip(read, batch["label"]):
    if record["num_objects"] > 0:
      assert record["label"] == 3 + label and names[record["label"]] in record["captions"][0]
    else:  # the photographs have no classes
      assert record["label"] == (-1 if len(record["captions"][0]) > 1 else "abc".index(record["captions"][0]))
  with pytest.raises(ValueError, match="source 'photos' is endless: set num_images"):
    write(tmp_path / "all", cfg)
