"""Damaged weights: safetensors files, their configs, tokenizer.json, checkpoints; see experiments/mutants.py."""

import functools
from pathlib import Path
import random
import tempfile

import jax
import numpy as np

from flextok_jax import config as common
from flextok_jax.data import text
from flextok_jax.training import checkpoint
from flextok_jax.weights import loading, orbax, saving
from tests.support import caption_tokenizers, runs
from tests.support.mutations import mutate


def tiny_tokenizer():
  """Returns (config, random parameters) of a tokenizer that the official format can hold."""
  config = common.derive(
    image_size=32,
    dtype="float32",
    vae=dict(latent_channels=4, block_out_channels=(4, 4), layers_per_block=1, norm_groups=2),
    encoder=dict(width=64, depth=2),
    decoder=dict(width=64, depth=2),
    tokens=dict(num_registers=4),
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), loading.abstract_params(config))
  return config, params


@functools.cache
def _files() -> dict[str, bytes]:
  """Returns weights of a tiny tokenizer in our format and in the official one, {file name: content}."""
  config, params = tiny_tokenizer()
  with tempfile.TemporaryDirectory() as folder:
    saving.save_weights(f"{folder}/ours.safetensors", config, params)
    saving.save_official(f"{folder}/hub", config, params)
    paths = [Path(folder, name) for name in ("ours.safetensors", "hub/model.safetensors", "hub/config.json")]
    return {path.name: path.read_bytes() for path in paths}


def safetensors(rng: random.Random, folder: Path):
  """Damages the header or all of a weights file of ours."""
  data = _files()["ours.safetensors"]
  end = 8 + int.from_bytes(data[:8], "little") if rng.random() < 0.7 else len(data)
  (folder / "weights.safetensors").write_bytes(mutate(data[:end], rng) + data[end:])
  loading.load(folder / "weights.safetensors")


def hub_config(rng: random.Random, folder: Path):
  """Damages the config.json beside official weights."""
  (folder / "model.safetensors").write_bytes(_files()["model.safetensors"])
  (folder / "config.json").write_bytes(mutate(_files()["config.json"], rng))
  loading.load(folder, vae_norm_num_groups=2)


@functools.cache
def _tokenizer() -> bytes:
  with tempfile.TemporaryDirectory() as folder:
    caption_tokenizers.word_level(Path(folder))
    return Path(folder, "tokenizer.json").read_bytes()


def tokenizer_json(rng: random.Random, folder: Path):
  """Damages a tokenizer.json."""
  (folder / "tokenizer.json").write_bytes(mutate(_tokenizer(), rng))
  text.make_tokenizer("t5", 10, str(folder))(["a red cube", "", "\ud800"])


@functools.cache
def _checkpoint() -> tuple[dict[str, bytes], dict]:
  """Returns ({name of a file of a workdir: content}, abstract averaged parameters)."""
  state = runs.random_state(runs.config_of(), 5)
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(state)
    checkpoints.close()
    found = {str(path.relative_to(folder)): data for path, data in runs.files_of(folder).items()}
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return found, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state.ema)


def orbax_items(rng: random.Random, folder: Path):
  """Damages a file of a checkpoint."""
  files, abstract = _checkpoint()
  harmed = rng.choice(sorted(files))
  for name, data in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(mutate(data, rng) if name == harmed else data)
  orbax.restore_average(str(folder), abstract, {})
