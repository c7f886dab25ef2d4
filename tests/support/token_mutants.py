"""Damaged token files, .npz files and shards, read as the commands read them; see experiments/mutants.py."""

import functools
import io
import json
from pathlib import Path
import random
import tempfile

import numpy as np

from flextok_jax.core import files
from flextok_jax.data.shards import writer
from flextok_jax.data.shards.features import FeatureShards
from flextok_jax.data.shards.files import FORMAT, shard_name
from flextok_jax.data.shards.images import ImageShards
from flextok_jax.data.shards.latents import LatentShards
from flextok_jax.data.shards.tokens import TokenFormat, TokenShards
from flextok_jax.evals.metrics import frechet
from flextok_jax.inference import image_files, token_files
from flextok_jax.weights.perception import files as perception_files
from tests.support.mutations import mutate

SIZE, TOKENS, IDS = 16, 4, 200
_FACTS = token_files.Facts("f", SIZE, TOKENS)
_NAMES = ["a.png", "b/é.png", "n" * 251 + ".png"]


@functools.cache
def _token_files() -> dict[str, bytes]:
  """Returns {suffix: token file}, and "part": the beginning of one."""
  ids = np.random.default_rng(0).integers(0, IDS, (len(_NAMES), TOKENS)).tolist()
  with tempfile.TemporaryDirectory() as folder:
    found = {}
    for suffix in token_files.SUFFIXES:
      path = Path(folder) / f"t{suffix}"
      token_files.write_tokens(path, _FACTS, list(zip(_NAMES, ids)), [(16, 8 + i) for i in range(len(ids))])
      found[suffix] = path.read_bytes()
  buffer = io.BytesIO()
  np.savez_compressed(buffer, names=np.array(_NAMES), token_ids=np.array(ids))
  rows = [["f", SIZE, TOKENS], *([name, None, None, row] for name, row in zip(_NAMES, ids))]
  rows[2][3] = "broken"
  part = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
  return {**found, "deflated.npz": buffer.getvalue(), ".part": part}


def token_file(rng: random.Random, folder: Path):
  """Reads a token file as detokenize does, or goes on with one that was begun as tokenize does."""
  suffix, data = rng.choice(sorted(_token_files().items()))
  path = folder / f"t{suffix}"
  path.write_bytes(mutate(data, rng))
  if suffix == ".part":
    with files.open_regular(path) as file:
      sized, ragged = rng.random() < 0.5, rng.random() < 0.5
      results = image_files._Results(
        file, ["f", SIZE, TOKENS], [(str(folder / name), name) for name in _NAMES], sized, ragged
      )
      entries = list(results)
      assert len(entries) == results.images and all(len(ids) == TOKENS or ragged for _, ids in entries)
      suffix = ".json" if ragged else rng.choice(token_files.SUFFIXES)
      token_files.write_tokens(folder / f"t{suffix}", _FACTS, results, results.sizes if sized else None)
    return
  names, ids, sizes = token_files.read_tokens(path, _FACTS, IDS)
  assert len(names) == len(ids) and all(0 < len(row) <= TOKENS and 0 <= min(row) <= max(row) < IDS for row in ids)
  assert sizes is None or all(0 < side <= 4096 for size in sizes for side in size) and len(sizes) == len(ids)
  for i, name in enumerate(names[:9]):
    files.write_file(folder / f"{i:05d}_{token_files.file_stem(name)}.png", b"")


@functools.cache
def _archives() -> dict[str, bytes]:
  rng, found = np.random.default_rng(0), {}
  statistics = dict(
    mu=rng.normal(size=5), sigma=np.eye(5), mu_s=rng.normal(size=5), sigma_s=np.asfortranarray(np.eye(5))
  )
  for write in (np.savez, np.savez_compressed):
    buffer = io.BytesIO()
    write(buffer, rng.integers(0, 256, (7, 4, 4, 3)).astype(np.uint8), **statistics)
    found[write.__name__] = buffer.getvalue()
  return found


def npz(rng: random.Random, folder: Path):
  """Reads statistics, samples or weights from an .npz file."""
  path = folder / "x.npz"
  path.write_bytes(mutate(rng.choice(sorted(_archives().items()))[1], rng))
  choice = rng.randrange(3)
  if choice == 0:
    frechet.load_statistics(path)
  elif choice == 1:
    for batch in frechet.SampleFile(path).batches(3):
      assert batch.dtype == np.uint8 and batch.shape[3] == 3
  else:
    perception_files.read(path, ("arr_",))


_ARRAYS = dict(fingerprint="f", image_size=SIZE, dtype="float16")
_KINDS = {  # of shards: (reader, fields of meta.json, content of a record)
  "tokens": (
    *(TokenShards, dict(fingerprint="f", image_size=SIZE, num_ids=IDS, num_tokens=TOKENS, quality=0.1, metric="mse")),
    lambda i: dict(ids=[i, 1, 2, 3], length=1 + i % TOKENS),
  ),
  "latents": (LatentShards, dict(_ARRAYS, shape=[2, 2, 4]), lambda i: dict(moments=np.full((2, 2, 4), i, np.float16))),
  "dino": (
    *(FeatureShards, dict(_ARRAYS, shape=[4, 3], teacher="t")),
    lambda i: dict(features=np.full((4, 3), i, np.float16)),
  ),
  "images": (ImageShards, dict(framed=False, flip=True), lambda i: dict(data=bytes([i]) * 99)),
}


@functools.cache
def _shards() -> dict[str, dict[str, bytes]]:
  """Returns {kind: {name: content}} of the files of a split."""
  found = {}
  for kind, (reader, fields, content) in _KINDS.items():
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / shard_name(kind, 0, 1)
      facts = dict(num_objects=-1, captions=["a caption", "é"])
      writer._write_shard(path, (reader.pack(dict(content(i), label=i % 3, **facts)) for i in range(5)))
      data = path.read_bytes()
    common = {"format": FORMAT, "what": kind, **fields, "copies": 1, "seed": 0}
    meta = {"num_records": 5, "class_names": ["a", "b", "c"], "shard_records": [5], "shard_bytes": [len(data)]}
    plan = {**common, "shards": 1, "sources": {"folder": {"path": "x"}}}
    found[kind] = {
      path.name: data,
      "meta.json": json.dumps({**common, **meta}, indent=1).encode(),
      "plan.json": json.dumps(plan, indent=1).encode(),
    }
  return found


def shards(rng: random.Random, folder: Path):
  """Reads all records of a split as training does, or resumes the writing of shards as far as their plan goes."""
  kind = rng.choice(sorted(_KINDS))
  reader, fields, content = _KINDS[kind]
  whole, split = _shards()[kind], folder / "train"
  split.mkdir()
  name = rng.choice(sorted(whole))
  data = {**whole, name: mutate(whole[name], rng)}
  if name.startswith(kind) and rng.random() < 0.9:  # past the check of sizes
    meta = json.loads(data["meta.json"])
    data["meta.json"] = json.dumps({**meta, "shard_bytes": [len(data[name])]}).encode()
  for file, text in data.items():
    (split / file).write_bytes(text)
  if name == "plan.json":
    writer._claim(split, json.loads(whole[name]))
    return
  if rng.random() < 0.2:  # one record, which in a file would have a checksum
    try:
      shard = object.__new__(reader)
      shard.meta = json.loads(whole["meta.json"])
      shard.parse(mutate(reader.pack(dict(content(3), label=2, num_objects=1, captions=["a"])), rng))
    except ValueError as e:
      raise ValueError(" ".join(str(e).split())) from None  # as Shards puts it
    return
  writer._count(split / shard_name(kind, 0, 1))
  read = reader(folder)
  if kind == "tokens":
    form = TokenFormat(num_ids=IDS, num_tokens=TOKENS, stop=True, num_classes=3)
    form.check(read.meta)
    assert all(form.row(read[i])["token_ids"].max() < IDS for i in range(len(read)))
  for i in range(len(read)):
    read[i]
