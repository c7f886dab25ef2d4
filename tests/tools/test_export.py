"""Exported programs run without this package and return what the model's own methods return."""

import json
from pathlib import Path
import re
import subprocess
import sys
import zipfile

import jax
import jax.export
import numpy as np
import pytest

from flextok_jax import export, load, load_ar
from flextok_jax.core import extras
from flextok_jax.stages import make_stage
from flextok_jax.stages.ar import ARStage
from flextok_jax.tools import export as tools_export
from flextok_jax.weights import fingerprints, saving
from tests.support import tiny_generators
from tests.support.commands import ROOT, environment, fails, run
from tests.support.tiny import latent_config, make_params, tiny_config

READER = re.search(r"```python\n(import json\n.*?)```", (ROOT / "docs" / "deploying.md").read_text(), re.DOTALL)[1]
ALONE = "import sys\nfor name in ('flextok_jax', 'flax', 'ml_collections'): sys.modules[name] = None\n"
BATCH = 3
CAPTIONS = ["a red star", "zwei Äpfel", ""]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns paths by name: tokenizers in pixels and over a VAE, and generators."""
  folder = tmp_path_factory.mktemp("models")
  paths = tiny_generators.save(folder)
  config = latent_config(sampler=dict(num_steps=3, guidance="apg", guidance_scale=3.0))
  saving.save_weights(folder / "latent", config, make_params(make_stage(config)))
  config = tiny_generators.generator_config(condition="text", guidance_scale=2.0)
  config.text.update(encoder="t5", max_length=6)
  saving.save_weights(folder / "t5", config, make_params(ARStage(config)))
  return {**paths, "latent": folder / "latent", "t5": folder / "t5"}


PROGRAMS = {  # by name: the flags
  "tokenize": ("tokenizer", "tokenize", ()),
  "tokenize_2": ("latent", "tokenize", ("--num_tokens=2",)),
  "detokenize": ("latent", "detokenize", ()),
  "detokenize_2": ("tokenizer", "detokenize", ("--num_tokens=2", "--num_steps=1", "--platforms=cpu")),
  "tokenize_wide": ("tokenizer", "tokenize", ("--size=24,40", "--posemb_scaling=interpolate")),
  "detokenize_wide": ("tokenizer", "detokenize", ("--size=24,40", "--posemb_scaling=interpolate")),
  "class": ("class", "generate", ("--top_k=50", "--temperature=0.9", "--guidance_scale=2")),
  "text": ("text", "generate", ("--top_p=0.9", "--guidance_scale=2", "--num_tokens=3")),
  "t5": ("t5", "generate", ()),
  "none": ("none", "generate", ("--greedy",)),
}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
  folder = tmp_path_factory.mktemp("programs")
  for name, (model, what, flags) in PROGRAMS.items():
    run(export, f"--checkpoint={models[model]}", f"--what={what}", f"--out={folder / name}.zip", *flags)
  return folder


@pytest.fixture(scope="module")
def given():
  """Returns inputs by the name of the program."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)
  seeds = np.array([8, 2**32 - 1, 8], np.uint32)
  rows = [[*caption.encode(), 256] for caption in CAPTIONS]
  text = dict(
    text_ids=np.array([row + [0] * (24 - len(row)) for row in rows], np.int32),
    text_lengths=np.array([len(row) for row in rows], np.int32),
  )
  features = dict(
    text_features=rng.normal(size=(BATCH, 6, 16)).astype(np.float32),
    text_lengths=np.array([6, 1, 3], np.int32),
    null_features=rng.normal(size=(1, 6, 16)).astype(np.float32),
    null_lengths=np.array([1], np.int32),
  )
  ids = rng.integers(0, tiny_generators.NUM_CODES, (BATCH, 4)).astype(np.int32)
  return {
    "tokenize": dict(images=images),
    "tokenize_2": dict(images=images),
    "tokenize_wide": dict(images=rng.integers(0, 256, (BATCH, 24, 40, 3), np.uint8)),
    "detokenize_wide": dict(ids=ids, keep_k=np.array([4, 1, 3], np.int32), seeds=seeds),
    "detokenize": dict(ids=ids, keep_k=np.array([4, 1, 3], np.int32), seeds=seeds),
    "detokenize_2": dict(ids=ids[:, :2], keep_k=np.array([2, 1, 2], np.int32), seeds=seeds),
    "class": dict(labels=np.array([3, -1, 0], np.int32), seeds=seeds),
    "text": dict(**text, seeds=seeds),
    "t5": dict(**features, seeds=seeds),
    "none": dict(seeds=seeds),
  }


@pytest.fixture(scope="module")
def outputs(files, given, tmp_path_factory):
  """Returns outputs by the name of the program, computed in a process that has neither this package nor flax."""
  folder = tmp_path_factory.mktemp("arrays")
  for name, inputs in given.items():
    np.savez(folder / f"{name}.npz", **inputs)
  program = f"""{ALONE}{READER}
for name in {list(given)!r}:
  about, program = load(f"{files}/{{name}}.zip")
  with np.load(f"{folder}/{{name}}.npz") as inputs:
    np.savez(f"{folder}/{{name}}_out.npz", **program(**inputs))
try:
  import flextok_jax
except ImportError:
  print("alone")
"""
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=folder, env=environment(8), capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "alone\n"
  found = {}
  for name in given:
    with np.load(folder / f"{name}_out.npz") as arrays:
      found[name] = dict(arrays)
  return found


def keys(seeds):
  """Returns the key of sample 0 of a batch drawn with each seed."""
  return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(seeds)


def to_8bit(images):
  return np.round(np.clip((np.asarray(images) + 1) * 127.5, 0, 255)).astype(np.uint8)


def test_tokenize(models, given, outputs):
  for name, model, count in (("tokenize", "tokenizer", 4), ("tokenize_2", "latent", 2)):
    expected = load(models[model]).tokenize(given[name]["images"], count)
    np.testing.assert_array_equal(outputs[name]["ids"], expected)
    assert outputs[name]["ids"].dtype == np.int32


def test_detokenize(models, given, outputs):
  for name, model, steps in (("detokenize", "latent", None), ("detokenize_2", "tokenizer", 1)):
    x = given[name]
    expected = load(models[model]).detokenize(x["ids"], x["keep_k"], keys(x["seeds"]), num_steps=steps)
    np.testing.assert_array_equal(outputs[name]["images"], to_8bit(expected))
    assert outputs[name]["images"].std() > 10


def test_other_sizes(models, files, given, outputs):
  model = load(models["tokenizer"], posemb_scaling="interpolate")
  x = given["detokenize_wide"]
  np.testing.assert_array_equal(outputs["tokenize_wide"]["ids"], model.tokenize(given["tokenize_wide"]["images"]))
  expected = model.detokenize(x["ids"], x["keep_k"], keys(x["seeds"]), size=(24, 40))
  np.testing.assert_array_equal(outputs["detokenize_wide"]["images"], to_8bit(expected))
  settings = {}
  for name in ("tokenize_wide", "detokenize_wide"):
    with zipfile.ZipFile(files / f"{name}.zip") as archive:
      settings[name] = json.loads(archive.read("about.json"))["settings"]
    assert settings[name]["size"] == [24, 40] and settings[name]["image_size"] == 16
  # Other positions of the encoder give other ids; the decoder takes those of the model's own encoder.
  assert settings["tokenize_wide"]["tokenizer"] == model.fingerprint
  assert settings["detokenize_wide"]["tokenizer"] == load(models["tokenizer"]).fingerprint


def test_sizes_that_a_model_does_not_take_are_one_line(models, tmp_path):
  given = f"--checkpoint={models['tokenizer']}", f"--out={tmp_path / 'x.zip'}"
  for what in ("tokenize", "detokenize"):
    fails("multiples of 4", export, *given, f"--what={what}", "--size=24,42")
    fails("6 x 4 patches", export, *given, f"--what={what}", "--size=24,16")
  fails("--size=24 must be height,width in pixels", export, *given, "--what=tokenize", "--size=24")
  fails("--size has no effect with --what=generate", export, *given, "--what=generate", "--size=8,8")
  tokens = dict(num_registers=16, levels=(8, 5, 5), layout="grid", nested_dropout="none")
  decoder = dict(width=32, depth=1, head_dim=16, patch_size=4, modulation="shared")
  config = tiny_config(tokens=tokens, decoder=decoder)
  saving.save_weights(tmp_path / "grid", config, make_params(make_stage(config)))
  for what in ("tokenize", "detokenize"):
    given = f"--checkpoint={tmp_path / 'grid'}", f"--what={what}", f"--out={tmp_path / 'x.zip'}"
    fails("must be 16 x 16, as each token has its place in a grid", export, *given, "--size=8,16")


def test_generate(models, given, outputs):
  seeds = keys(given["none"]["seeds"])
  x = given["t5"]
  expected = {
    "class": load_ar(models["class"]).generate(
      seeds, labels=given["class"]["labels"], top_k=50, temperature=0.9, guidance_scale=2.0
    ),
    "t5": load_ar(models["t5"]).generate(
      seeds,
      text_embeddings=x["text_features"],
      text_lengths=x["text_lengths"],
      null_text_embeddings=x["null_features"],
      null_text_lengths=x["null_lengths"],
    ),
    "none": load_ar(models["none"]).generate(seeds, greedy=True),
  }
  for name, ids in expected.items():
    np.testing.assert_array_equal(outputs[name]["ids"], ids)
    np.testing.assert_array_equal(outputs[name]["lengths"], [4] * BATCH)
  np.testing.assert_array_equal(outputs["none"]["ids"][0], outputs["none"]["ids"][2])


def test_generate_by_caption_with_an_end(models, given, outputs):
  gen, found = load_ar(models["text"]), outputs["text"]
  features, lengths = gen.encode_text(CAPTIONS)
  np.testing.assert_array_equal(lengths, given["text"]["text_lengths"])
  seeds = keys(given["text"]["seeds"])
  text = dict(text_embeddings=features, text_lengths=lengths)
  ids = gen.generate(seeds, **text, num_tokens=3, top_p=0.9, guidance_scale=2.0)
  np.testing.assert_array_equal(found["ids"], ids)
  np.testing.assert_array_equal(found["lengths"], [len(row) for row in gen.trim(ids)])
  assert 1 <= found["lengths"].min() < 3


def test_rows_do_not_depend_on_the_batch(files, given, outputs):
  """Other batch sizes, one of them padded, and generated ids that are decoded as they are."""
  scope = {}
  exec(READER, scope)
  _, program = scope["load"](files / "text.zip")
  for rows in ([1], [2, 1, 0, 0, 0]):
    ids = program(**{name: x[rows] for name, x in given["text"].items()})["ids"]
    np.testing.assert_array_equal(ids, outputs["text"]["ids"][rows])
  about, decode = scope["load"](files / "detokenize.zip")
  ids = np.full((2, 4), tiny_generators.NUM_CODES, np.int32)
  ids[:, :2] = given["detokenize"]["ids"][0, :2]
  ids[1, 2:] = 0
  keep_k, seeds = np.full(2, 2, np.int32), np.full(2, 7, np.uint32)
  images = np.asarray(decode(ids=ids, keep_k=keep_k, seeds=seeds)["images"])
  np.testing.assert_array_equal(images[0], images[1])
  assert about["outputs"]["images"]["shape"] == ["b", 16, 16, 3]


def test_about(models, files):
  model = load(models["latent"])
  with zipfile.ZipFile(files / "detokenize.zip") as archive:
    assert {item.compress_type for item in archive.infolist()} == {zipfile.ZIP_STORED}
    about = json.loads(archive.read("about.json"))
    assert {item.filename for item in archive.infolist()} == {
      "about.json",
      "program.bin",
      *(f"{name}.npy" for name in about["weights"]),
    }
    program = jax.export.deserialize(bytearray(archive.read("program.bin")))
  assert program.platforms == ("cpu", "cuda", "tpu") == tuple(about["platforms"])
  assert about["program"] == "detokenize" and list(about["inputs"]) == ["ids", "keep_k", "seeds"]
  assert about["inputs"]["ids"] | {"description": ""} == {"dtype": "int32", "shape": ["b", 4], "description": ""}
  assert about["settings"]["tokenizer"] == fingerprints.tokenizer(model.config, model.params)
  assert about["settings"]["sampler"]["guidance_scale"] == 3.0 and about["settings"]["image_size"] == 16
  with zipfile.ZipFile(files / "class.zip") as archive:
    settings = json.loads(archive.read("about.json"))["settings"]
  assert settings["tokenizer"] == load_ar(models["class"]).config.ar.tokenizer
  assert settings["sampler"]["top_k"] == 50 and settings["sampler"]["guidance_scale"] == 2.0
  assert settings["condition"] == "class" and settings["class_names"] == [] and settings["stop_id"] is None
  # Only the weights that the program reads.
  names = " ".join(about["weights"])
  assert "params.decoder." in names and "params.vae.decoder." in names
  assert "params.encoder." not in names and "params.vae.encoder." not in names


def test_every_platform_has_the_portable_attention(models, tmp_path, monkeypatch):
  """Also on a GPU, where the model itself would choose the kernel of cuDNN."""
  model = load(models["tokenizer"], dtype="bfloat16")
  monkeypatch.setattr("flextok_jax.ops.attention._obstacle", lambda *args: "")
  about = tools_export.write(tmp_path / "x.zip", tools_export.tokenize(model))
  with zipfile.ZipFile(tmp_path / "x.zip") as archive:
    program = jax.export.deserialize(bytearray(archive.read("program.bin")))
  assert "cudnn" not in program.mlir_module() and "dot_general" in program.mlir_module()
  assert {x["dtype"] for x in about["weights"].values()} == {"bfloat16"}


def test_bad_input(models, tmp_path, monkeypatch):
  out = f"--out={tmp_path / 'x.zip'}"
  tokenizer, gen = f"--checkpoint={models['tokenizer']}", f"--checkpoint={models['class']}"
  fails("--checkpoint is missing", export, "--what=tokenize", out)
  fails("--what is missing", export, tokenizer, out)
  fails(
    "--temperature has no effect with --what=tokenize", export, tokenizer, "--what=tokenize", "--temperature=1", out
  )
  fails("load_ar", export, gen, "--what=detokenize", out)
  fails("num_tokens=5 must be a whole number from 1 to 4", export, tokenizer, "--what=tokenize", "--num_tokens=5", out)
  fails("num_tokens=5 must be a whole number from 1 to 4", export, gen, "--what=generate", "--num_tokens=5", out)
  fails("top_p=2.0 must be", export, gen, "--what=generate", "--top_p=2", out)
  fails("platforms=cpu,abacus", export, tokenizer, "--what=tokenize", "--platforms=cpu,abacus", out)
  fails("is a folder: give a file", export, tokenizer, "--what=tokenize", f"--out={tmp_path}")
  monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(extras.MissingPackageError, match=r"pip install 'flextok-jax\[export\]'"):
    run(export, tokenizer, "--what=tokenize", out)
  assert list(Path(tmp_path).iterdir()) == []
