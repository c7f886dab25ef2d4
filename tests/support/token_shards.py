"""Pictures, a stand-in for a tokenizer, and token shards."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flextok_jax.config import derive
from flextok_jax.data.shards import tokens, writer
from flextok_jax.training.inputs import image_data

SIZE, TOKENS, IDS = 16, 4, 200
TOKENIZER = dict(fingerprint="0123456789abcdef", dtype="float32", image_size=SIZE, num_ids=IDS, num_tokens=TOKENS)


def encode(images):
  """Stand-in for a tokenizer: ids are means of quadrants, the length is the first id modulo 4, plus 1."""
  quarters = images.reshape(len(images), 2, SIZE // 2, 2, SIZE // 2, 3).mean((2, 4, 5)).reshape(len(images), TOKENS)
  ids = quarters.astype(np.int32) % IDS
  return ids, ids[:, 0] % TOKENS + 1


def write_folder(path: Path, count: int) -> Path:
  rng = np.random.default_rng(0)
  for i in range(count):
    (path / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((24, 18))
    picture.save(path / "abc"[i % 3] / f"{i:02d}.png")
  return path


def make_pictures(root: Path) -> Path:
  """Writes pictures of the classes a, b and c to root/train and root/validation, and returns root/train."""
  write_folder(root / "validation", 7)
  return write_folder(root / "train", 23)


def config(pictures: Path, **data: Any):
  folder = dict(weight=1.0, path=str(pictures), val_path=str(pictures.parent / "validation"))
  sources = dict(tfds=dict(weight=0.0), folder=folder) | data.pop("sources", {})
  return derive(seed=data.pop("seed", 0), data=dict(num_threads=2, prefetch=1, sources=sources) | data)


def write(out, cfg, encode=encode, **kwargs):
  """Writes token shards of a config's images; arguments are those of TokenRecords and write_shards."""
  given = dict(num_shards=4, batch_size=3, quality=0.1, metric="mse") | kwargs
  kind = tokens.TokenRecords(encode, TOKENIZER, *(given.pop(name) for name in ("batch_size", "quality", "metric")))
  return write_records(out, kind, cfg, **given)


def write_records(out, kind, cfg, **kwargs):
  """Calls write_shards with the images of a config."""
  return writer.write_shards(out, kind, image_data(cfg), **dict(seed=cfg.seed) | kwargs)


def records(out, split="train"):
  read = tokens.TokenShards(out, split)
  return [{**r, "ids": r["ids"].tolist()} for r in (read[i] for i in range(len(read)))]
