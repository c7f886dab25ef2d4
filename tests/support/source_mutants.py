"""Damaged tar files, metadata and caption files, read as data sources read them; see experiments/mutants.py."""

from pathlib import Path
import random

import numpy as np

from flextok_jax.data.sources import base, registry
from flextok_jax.inference import prompts
from tests.support.mutations import mutate
from tests.support.tars import picture, shard

_METADATA = {
  "metadata.jsonl": '{"file_name": "a.png", "text": "one", "label": 3}\n{"file_name": "b.png", "text": null}\n',
  "metadata.csv": 'file_name,text,label\na.png,"one, ""two""",cat\nb.png,three,dog\n',
}
_CAPTIONS = {".txt": "one caf\u00e9\r\ntwo\n", ".json": '{"caption": "one", "captions": ["two", "\\ud83d\\ude00"]}'}


def tars(rng: random.Random, folder: Path):
  """Reads all records of a damaged tar file."""
  (folder / "a.tar").write_bytes(mutate(shard(0, 2), rng))
  (folder / "v.tar").write_bytes(shard(2, 1))
  _read("webdataset", f"{folder}/a.tar", f"{folder}/v.tar")


def texts(rng: random.Random, folder: Path):
  """Reads all records of a folder with a damaged metadata or caption file, or damaged prompts."""
  if rng.random() < 0.2:
    (folder / "prompts.txt").write_bytes(mutate(_CAPTIONS[".txt"].encode("utf-8-sig"), rng))
    found = prompts.read_prompts(str(folder / "prompts.txt"))
    assert all(prompt.strip() == prompt != "" for prompt in found)
    return
  for name in ("train", "validation"):
    (folder / name).mkdir()
    for value, stem in enumerate("ab"):
      (folder / name / f"{stem}.png").write_bytes(picture(value))
  name, text = rng.choice([*_METADATA.items(), *((f"a{suffix}", text) for suffix, text in _CAPTIONS.items())])
  (folder / "train" / name).write_bytes(mutate(text.encode(), rng))
  _read("folder", f"{folder}/train", f"{folder}/validation")


def _read(kind: str, path: str, val_path: str):
  source = registry.make_source(kind, "train", path=path, val_path=val_path)
  unreadable = None
  for i in range(len(source)):
    try:
      record = base.view(source, i, np.size)
    except base.UnreadableRecord as error:
      unreadable = error
      continue
    assert -1 <= record["label"] < 2**31 and all(isinstance(text, str) for text in record["captions"])
    "".join(record["captions"]).encode()  # valid Unicode
  if unreadable is not None:
    raise unreadable
