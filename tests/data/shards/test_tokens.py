"""Reading token shards: deterministic batches; incomplete or incompatible shards are refused."""

import json

import numpy as np
import pytest

from flextok_jax.config import derive
from flextok_jax.data.shards import tokens, writer
from flextok_jax.data.shards.files import shard_name
from flextok_jax.training import inputs
from tests.support.token_shards import IDS, TOKENS, config, records, write

pack = tokens.TokenShards.pack


def ar_config(out, **overrides):
  ar = dict(num_ids=IDS, num_tokens=TOKENS, num_classes=3, drop_condition=0.0) | overrides.pop("ar", {})
  data = dict(tokens=str(out), global_batch=6, num_threads=2, prefetch=1) | overrides.pop("data", {})
  return derive(stage="ar", ar=ar, data=data, **overrides)


def steps(cfg, count, **kwargs):
  data = inputs.image_data(cfg)
  options = dict(seed=cfg.seed, drop_condition=cfg.ar.drop_condition, global_batch=cfg.data.global_batch) | kwargs
  batches = tokens.train_batches(*inputs.open_tokens(cfg, "train"), data.loading, **options)
  return [next(batches) for _ in range(count)]


def eval_arrays(cfg, count, split="train"):
  return tokens.eval_arrays(*inputs.open_tokens(cfg, split), count)


def equal(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_batches(written):
  by_ids = {tuple(r["ids"]): r for r in records(written)}
  for batch in steps(ar_config(written), 2):
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
      "token_ids": ((6, TOKENS), "int32"),
      "length": ((6,), "int32"),
      "label": ((6,), "int32"),
      "unreadable": ((6,), "int32"),
    }
    assert (batch["length"] == TOKENS).all() and not batch["unreadable"].any()
    for ids, label in zip(batch["token_ids"], batch["label"]):
      assert by_ids[tuple(ids)]["label"] == label


def test_lengths_and_token_counts(written):
  full = steps(ar_config(written), 2)
  for stop, count in ((True, 4), (True, 3), (False, 3)):
    for batch, all_ids in zip(steps(ar_config(written, ar=dict(stop=stop, num_tokens=count)), 2), full):
      lengths = np.minimum(all_ids["token_ids"][:, 0] % 4 + 1, count) if stop else np.full(6, count)
      assert batch["length"].tolist() == lengths.tolist()
      kept = np.where(np.arange(count) < lengths[:, None], all_ids["token_ids"][:, :count], 0)
      np.testing.assert_array_equal(batch["token_ids"], kept)


def test_batches_depend_only_on_seed_and_step(written):
  reference = steps(ar_config(written), 4)
  assert not equal(reference[0], steps(ar_config(written, seed=1), 1)[0])
  for start in (1, 3):
    assert equal(steps(ar_config(written), 1, start_step=start)[0], reference[start])
  parts = [steps(ar_config(written), 2, start_step=2, process_index=p, process_count=3) for p in range(3)]
  for s in range(2):
    assert equal({k: np.concatenate([part[s][k] for part in parts]) for k in reference[0]}, reference[2 + s])
  for data in (dict(num_threads=0), dict(num_workers=2)):
    assert all(equal(a, b) for a, b in zip(steps(ar_config(written, data=data), 3), reference))
  with pytest.raises(ValueError, match="global_batch=6 is not divisible by 4 processes"):
    steps(ar_config(written), 1, process_count=4)


def test_every_epoch_visits_every_record(written):
  epochs = steps(ar_config(written, data=dict(global_batch=69)), 2)
  expected = sorted(tuple(r["ids"]) for r in records(written))
  rows = [[tuple(row) for row in epoch["token_ids"].tolist()] for epoch in epochs]
  assert rows[0] != rows[1] and sorted(rows[0]) == sorted(rows[1]) == expected


def test_text_is_drawn_from_the_captions(tmp_path):
  captions = ["x", "long", "longer still"]
  path = tmp_path / "train" / shard_name("tokens", 0, 1)
  path.parent.mkdir()
  texts = [dict(ids=[i], length=1, label=-1, num_objects=i, captions=captions if i else []) for i in range(3)]
  writer._write_shard(path, map(pack, texts))
  meta = dict(
    format=1,
    what="tokens",
    fingerprint="f",
    image_size=16,
    num_ids=IDS,
    num_tokens=1,
    num_records=3,
    copies=1,
    class_names=None,
    quality=None,
    metric=None,
    shard_records=[3],
    shard_bytes=[path.stat().st_size],
  )
  (path.parent / "meta.json").write_text(json.dumps(meta))
  cfg = ar_config(tmp_path, ar=dict(condition="text", num_tokens=1), text=dict(encoder="bytes", max_length=20))
  batches = steps(cfg, 4)
  drawn = {
    (int(i), bytes(row[: n - 1].tolist()).decode())
    for b in batches
    for i, row, n in zip(b["token_ids"][:, 0], b["text_ids"], b["text_lengths"])
  }
  assert drawn == {(0, ""), *((i, caption) for i in (1, 2) for caption in captions)}
  assert equal(steps(cfg, 1, start_step=3)[0], batches[3]) and batches[0]["text_ids"].shape == (6, 20)
  arrays = eval_arrays(cfg, 9)
  assert sorted(zip(arrays["num_objects"], arrays["captions"])) == [(0, ""), (1, "x"), (2, "x")]
  assert arrays["text_lengths"].tolist() == [len(c) + 1 for c in arrays["captions"]]


def test_eval_arrays_have_images_in_a_fixed_order(written):
  few, more = (eval_arrays(ar_config(written), n) for n in (5, 99))
  first_copies = sorted(tuple(r["ids"]) for r in records(written)[::3])
  assert sorted(map(tuple, more["token_ids"].tolist())) == first_copies
  assert len(few["captions"]) == 5 and all(np.array_equal(few[k], more[k][:5]) for k in few)
  assert few["captions"] == ["abc"[label] for label in few["label"]] and len(set(few["captions"])) > 1
  assert eval_arrays(ar_config(written), 99, "validation")["label"].shape == (7,)
  with pytest.raises(ValueError, match="at least one record, got num_records=0"):
    eval_arrays(ar_config(written), 0)


@pytest.mark.parametrize(
  "pattern, ar, lacks",
  [
    ("of tokenizer 0123456789abcdef, but ar.tokenizer is beef: write shards", dict(tokenizer="beef"), {}),
    ("have 200 ids, but ar.num_ids is 64000: set ar.num_ids=200", dict(num_ids=64_000), {}),
    ("have 4 tokens per image, but ar.num_tokens is 5", dict(num_tokens=5), {}),
    ("have 3 classes, but ar.num_classes is 2", dict(num_classes=2), {}),
    ("stop needs the lengths of the sequences, which .* lack", dict(stop=True), dict(quality=None)),
  ],
  ids=["tokenizer", "num_ids", "num_tokens", "classes", "stop"],
)
def test_incompatible_shards_are_refused(written, pattern, ar, lacks):
  meta = tokens.TokenShards(written).meta
  known = dict(num_ids=IDS, num_tokens=TOKENS, stop=False, num_classes=3)
  with pytest.raises(ValueError, match=pattern) as caught:
    tokens.TokenFormat(**known | ar).check({**meta, **lacks})
  assert "\n" not in str(caught.value)


def test_shards_of_the_expected_tokenizer_are_accepted(written):
  inputs.open_tokens(ar_config(written, ar=dict(tokenizer="0123456789abcdef")), "train")
  inputs.open_tokens(ar_config(written, ar=dict(num_classes=1, condition="none")), "train")


def test_labels_out_of_range_are_refused(pictures, tmp_path):
  write(tmp_path, config(pictures))
  path = tmp_path / "train" / "meta.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": None}))
  with pytest.raises(ValueError, match="label 2, but ar.num_classes is 2"):
    steps(ar_config(tmp_path, ar=dict(num_classes=2)), 5)


def test_damaged_folders_are_one_line_errors(pictures, tmp_path):
  write(tmp_path / "x", config(pictures), num_shards=2)
  folder = tmp_path / "x" / "train"
  meta, shard = folder / "meta.json", folder / shard_name("tokens", 1, 2)
  whole, text = shard.read_bytes(), meta.read_text()

  def refused(pattern, folder=tmp_path / "x", split="train", error=ValueError):
    with pytest.raises(error, match=pattern) as caught:
      records(folder, split)
    assert "\n" not in str(caught.value)

  refused(r"no token shards of split 'train' in '.*absent'", tmp_path / "absent", error=FileNotFoundError)
  refused(r"of split 'validation' .*it has train", split="validation", error=FileNotFoundError)
  with pytest.raises(ValueError, match="set data.tokens to a folder"):
    steps(ar_config(""), 1)
  other = text.replace('"num_records": 23', '"num_records": 2')
  fields = dict(
    copies=0, shard_records="x" * 10**6, shard_bytes=[1], num_ids=1e9, class_names=[1], quality=[], metric=1
  )
  bad = [json.dumps(json.loads(text) | {name: value}) for name, value in fields.items()]
  for content in ("", "{", "[]", '{"format": 2}', '{"format": 1}', other, *bad):
    meta.write_text(content)
    refused(r"meta.json (does not describe token shards|cannot be read) \(.*\): delete it and rerun")
  meta.write_text(text)
  shard.write_bytes(whole[:-70_000])
  refused(f"00001-of-00002.array_record has {len(whole) - 70_000} bytes instead of {len(whole)}: delete it and rerun")
  shard.unlink()
  refused("00001-of-00002.array_record is missing: rerun", error=FileNotFoundError)
  bent = bytearray(whole)
  bent[70_000 if len(whole) > 140_000 else 200] ^= 0xFF
  shard.write_bytes(bent)
  refused(r"00001-of-00002.array_record: record \d+ cannot be read \(.*\): delete the file and rerun")
  shard.unlink()
  write(tmp_path / "x", config(pictures), num_shards=2)
  assert shard.read_bytes() == whole and meta.read_text() == text


@pytest.mark.parametrize(
  "data",
  [b"", b"\x00", b"\xc1", pack(dict(ids=[1], length=1, label=0, num_objects=0, captions=["a"]))[:-1]],
  ids=["empty", "number", "reserved", "cut"],
)
def test_malformed_records_are_refused(data):
  with pytest.raises(ValueError, match="not a record of tokens"):
    tokens.unpack(data)


def test_any_text_can_be_stored():
  record = dict(ids=[0, 65_535], length=2, label=-1, num_objects=-1, captions=["\ud800 café", ""])
  read = tokens.unpack(pack(record))
  assert read.pop("ids").tolist() == [0, 65_535]
  assert read == dict(length=2, label=-1, num_objects=-1, captions=["? café", ""])
