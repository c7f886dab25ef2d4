"""Loading and saving: official tokenizers with all options, diffusers autoencoders, the hub's cache."""

import functools
import json
from pathlib import Path
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from ml_collections import FrozenConfigDict
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flextok_jax
from flextok_jax import config as common
from flextok_jax.core import hub, tensor_file
from flextok_jax.inference import tokenizer as api
from flextok_jax.ops import posemb
from flextok_jax.weights import loading, reading, saving
from tests.support.random_tokenizer import GROUPS, random_model, with_fields

ROOT = Path(__file__).parents[2]
LOAD = dict(vae_norm_num_groups=GROUPS, image_size=32)
OPTIONS = {
  "default": {},
  "learnable sum, interpolated": dict(encoder=dict(posemb="learnable_sum", posemb_scaling="interpolate", max_grid=7)),
  "learnable product": dict(decoder=dict(posemb="learnable_prod"), encoder=dict(posemb="learnable_prod")),
  "rectangular table": dict(
    encoder=dict(posemb="sincos_released", max_grid=9, max_grid_width=5),
    decoder=dict(posemb="sincos_released", max_grid=4, max_grid_width=6, posemb_scaling="interpolate"),
  ),
  "larger sincos table": dict(encoder=dict(max_grid=9), decoder=dict(max_grid=6)),
  "plain MLP with biases": dict(decoder=dict(gated_mlp=False, mlp_bias=True, mlp_ratio=3.0, activation="gelu")),
  "gelu by tanh": dict(encoder=dict(gated_mlp=True, mlp_bias=True, activation="gelu_tanh")),
  "attention biases, no q/k norm": dict(encoder=dict(qkv_bias=True, out_bias=True), decoder=dict(qk_norm=False)),
  "shared modulation": dict(decoder=dict(modulation="shared", head_modulation_bias=False)),
  "head without modulation": dict(decoder=dict(head_modulation=False, head_bias=False, code_bias=False)),
  "single null token, time to 1000": dict(decoder=dict(null_condition="single", max_timestep=1000.0)),
  "zero null condition": dict(decoder=dict(null_condition="zero"), encoder=dict(head_bias=False)),
  "patches": dict(encoder=dict(patch_size=4, head_dim=32), decoder=dict(patch_size=1)),
  "levels": dict(tokens=dict(levels=(7, 5))),
  "flow": dict(flow=dict(t_sampling="stratified_logit_normal", mode_scale=0.0)),
}


def assert_same(a, b):
  """Asserts equal arrays of equal types."""
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a.params, b.params)
  assert jax.tree.map(lambda x: x.dtype, a.params) == jax.tree.map(lambda x: x.dtype, b.params)


def random_of(sections):
  tokens = dict(num_registers=6, nested_dropout="uniform") | sections.get("tokens", {})
  halves = {}
  for half in ("encoder", "decoder"):
    part = dict(width=64, depth=2, patch_size=2) | sections.get(half, {})
    # As in the files, so that the loaded config is this one, whose shapes are known; "default" leaves it open.
    halves[half] = ({"max_grid": 8 // part["patch_size"]} if sections else {}) | part
  config = common.derive(
    image_size=32,
    dtype="float32",
    vae=dict(latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, norm_groups=GROUPS),
    **halves,
    tokens=tokens,
    **{k: v for k, v in sections.items() if k not in ("encoder", "decoder", "tokens")},
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), loading.abstract_params(config))
  return api.FlexTok(params, FrozenConfigDict(config))


@pytest.mark.parametrize("name", OPTIONS)
def test_round_trip_of_all_options(tmp_path, name):
  model = random_of(OPTIONS[name])
  model.to_official(tmp_path / "model.safetensors")
  again = flextok_jax.load(tmp_path / "model.safetensors", **LOAD)
  assert_same(model, again)
  for section in ("encoder", "decoder", "tokens", "flow"):
    for field, value in OPTIONS[name].get(section, {}).items():
      assert again.config[section][field] == value, field


def test_a_mup_readout_requires_its_base_width(tmp_path):
  model = random_of(dict(encoder=dict(readout_multiplier=0.5)))
  model.to_official(tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="mup_base_width"):
    flextok_jax.load(tmp_path / "model.safetensors", **LOAD)
  again = flextok_jax.load(tmp_path / "model.safetensors", mup_base_width=32, **LOAD)
  assert again.config.encoder.readout_multiplier == 0.5 and again.config.decoder.readout_multiplier == 1
  assert_same(model, again)


ASSETS = sorted((ROOT / "flextok_jax" / "assets").glob("*.safetensors"))


def test_shipped_weights_have_a_checksum():
  assert len(ASSETS) == 11 and all(tensor_file.CHECKSUM in tensor_file.TensorFile(path).metadata for path in ASSETS)


@pytest.mark.parametrize("where", ["first array", "last array", "config", "checksum"])
def test_a_flipped_bit_in_a_weights_file_is_noticed(tmp_path, where):
  data = bytearray(ASSETS[0].read_bytes())
  start = 8 + int.from_bytes(data[:8], "little")
  places = {
    "first array": start,
    "last array": len(data) - 1,
    "config": data.index(rb"guidance_scale\": ") + len(rb"guidance_scale\": "),  # another digit
    "checksum": data.index(tensor_file.CHECKSUM.encode()) + len(tensor_file.CHECKSUM) + 3,
  }
  data[places[where]] ^= 1
  path = tmp_path / "weights.safetensors"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=f"^{path} is damaged: it differs from the checksum in it"):
    flextok_jax.load(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
  """Also those that are not in the type that is asked for: 1e6 is beyond float16."""
  config, params = loading.load(ASSETS[0])
  bias = np.array(params["encoder"]["head"]["bias"])
  bias[-1] = value
  params = {**params, "encoder": {**params["encoder"], "head": {**params["encoder"]["head"], "bias": bias}}}
  path = tmp_path / "weights.safetensors"
  saving.save_weights(path, config, params)
  wrong = "values beyond those of float16" if value == 1e6 else "NaN or infinite values"
  with warnings.catch_warnings(), pytest.raises(ValueError, match=f"^{path}: encoder/head/bias has {wrong}"):
    warnings.simplefilter("error")
    loading.load(path, param_dtype="float16")


@pytest.fixture(scope="module")
def model():
  return random_model()


def test_both_dtypes_in_both_formats(model, tmp_path):
  """bfloat16 halves the tokenizer, keeps the VAE in float32, and is bit-exact in both formats."""
  model.to_official(tmp_path / "exact.safetensors")
  low = flextok_jax.load(tmp_path / "exact.safetensors", dtype="bfloat16", **LOAD)
  types = {k: {x.dtype.name for x in jax.tree.leaves(v)} for k, v in low.params.items()}
  assert types == {"vae": {"float32"}, "encoder": {"bfloat16"}, "decoder": {"bfloat16"}}
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params["decoder"])
  jax.tree.map(np.testing.assert_array_equal, low.params["decoder"], rounded)
  assert low.config.dtype == "bfloat16"
  low.to_official(tmp_path / "hub")
  assert_same(low, flextok_jax.load(tmp_path / "hub", dtype="bfloat16", **LOAD))
  low.save(tmp_path / "ours")
  again = flextok_jax.load(tmp_path / "ours")
  assert_same(low, again)
  assert again == api.FlexTok(again.params, low.config)
  assert_same(model, flextok_jax.load(tmp_path / "exact.safetensors", dtype="float32", **LOAD))


def test_load_onto_a_mesh(model, tmp_path):
  model.to_official(tmp_path / "model.safetensors")
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spread = flextok_jax.load(tmp_path / "model.safetensors", mesh=mesh, **LOAD)
  assert_same(model, spread)
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(spread.params)} == {8}


def test_a_pixel_model_cannot_be_saved_in_the_official_format():
  model = flextok_jax.load(ROOT / "flextok_jax" / "assets" / "shapes.safetensors")
  with pytest.raises(ValueError, match="vae.kind.*pixels"):
    model.to_official("/absent/model.safetensors")


def test_image_size(model, tmp_path):
  """The authors' 32 latent pixels per side, or less if position tables are smaller, or the requested size."""
  path = tmp_path / "model.safetensors"
  model.to_official(path)
  load = lambda **kwargs: flextok_jax.load(path, vae_norm_num_groups=GROUPS, **kwargs).image_size
  assert load() == 4 * 2 * 4 and load(image_size=16) == 16
  random_of(dict(encoder=dict(max_grid=40), decoder=dict(max_grid=20))).to_official(path)
  assert load() == 32 * 4
  with pytest.raises(ValueError, match="max_grid 20 is less than the 32 patches per side of image_size 256"):
    load(image_size=256)


# Autoencoders.


@pytest.fixture(scope="module")
def autoencoder(model, tmp_path_factory):
  """Returns a folder as written by diffusers."""
  folder = tmp_path_factory.mktemp("vae") / "vae"
  api.FlexTok({"vae": model.params["vae"]}, with_fields(model, stage="vae")).to_official(folder)
  return folder


def test_autoencoder_round_trip(model, autoencoder, tmp_path):
  assert sorted(p.name for p in autoencoder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
  again = flextok_jax.load(autoencoder)
  jax.tree.map(np.testing.assert_array_equal, again.params["vae"], model.params["vae"])
  assert again.config.vae.norm_groups == GROUPS and again.config.vae.scaling_factor == model.config.vae.scaling_factor
  images = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
  np.testing.assert_array_equal(again.encode_latents(images), model.encode_latents(images))
  with pytest.raises(ValueError, match="give a folder"):
    again.to_official(tmp_path / "vae.safetensors")


def test_legacy_attention_names(autoencoder, model, tmp_path):
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  weights = {}
  for name, value in load_file(autoencoder / hub.WEIGHTS[1]).items():
    for new, before in old.items():
      name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
    weights[name] = value
  assert sum("proj_attn" in name for name in weights) == 4
  save_file(weights, tmp_path / hub.WEIGHTS[1])
  (tmp_path / "config.json").write_bytes((autoencoder / "config.json").read_bytes())
  again = flextok_jax.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, again.params["vae"], model.params["vae"])


def test_weights_and_config_must_agree(autoencoder, tmp_path):
  config = json.loads((autoencoder / "config.json").read_text())
  (tmp_path / hub.WEIGHTS[1]).write_bytes((autoencoder / hub.WEIGHTS[1]).read_bytes())
  for field, value in (("latent_channels", 8), ("block_out_channels", [8, 8, 16])):
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=f"{field} is .* in config.json and .* in the weights"):
      flextok_jax.load(tmp_path)


@pytest.mark.parametrize(
  "name, value",
  [("encoder.width", 10**9), ("decoder.depth", 60_000), ("tokens.num_registers", 10**6), ("ar.num_ids", 10**8)],
)
def test_sizes_in_a_config_are_compared_with_the_tensors_first(tmp_path, monkeypatch, name, value):
  """Nothing is built for a config that describes more than the file can hold."""
  asset = next(path for path in ASSETS if path.stem == ("shapes_ar" if name.startswith("ar.") else "shapes"))
  file = tensor_file.TensorFile(asset)
  config = common.parse_config(file.metadata[loading.CONFIG_KEY], "x")
  with config.unlocked():
    config.update_from_flattened_dict({name: value})
  monkeypatch.setattr(reading, "init_shapes", None)
  path = tmp_path / "weights.safetensors"
  tensors = {k: (file.dtypes[k], file.shapes[k], functools.partial(file.read, k)) for k in file}
  tensor_file.write(path, tensors, {loading.CONFIG_KEY: config.to_json()})
  with pytest.raises(ValueError, match=f"{name} (is|must be) .*{value}") as error:
    loading.load(path)
  assert str(path) in str(error.value)


def test_sizes_of_tables_are_compared_with_the_tensors_first(model, tmp_path, monkeypatch):
  """A table of 512 x 512 positions would take 1 MB per feature."""
  model.to_official(tmp_path / "hub")
  path = tmp_path / "hub" / "config.json"
  text = path.read_text()
  path.write_text(re.sub(r'("max_sizes": \[\s*)4(,\s*)4(\s*\])', r"\g<1>512\g<2>512\g<3>", text))
  assert path.read_text() != text
  monkeypatch.setattr(posemb, "grid_table", None)
  with pytest.raises(ValueError, match=r"posembs has shape .*, expected \[1, 64, 512, 512\]"):
    flextok_jax.load(tmp_path / "hub", **LOAD)


# Other people's files.


def in_shards(folder, weights):
  """Writes the weights of an index in two files in place of one file."""
  tensors = load_file(folder / weights)
  stem = weights.removesuffix(".safetensors")
  index = {name: f"{stem}-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
  for file in set(index.values()):
    save_file({k: v for k, v in tensors.items() if index[k] == file}, folder / file)
  (folder / f"{weights}.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
  (folder / weights).unlink()


def as_variant(folder, weights):
  (folder / weights).rename(folder / weights.replace(".safetensors", ".fp16.safetensors"))


def wrapped(*names):
  def change(folder, weights):
    tensors = {names[0] + name.replace(".", names[1], 1): x for name, x in load_file(folder / weights).items()}
    save_file(tensors, folder / weights)

  return change


CHANGES = {
  "shards": in_shards,
  "variant": as_variant,
  "module.": wrapped("module.", "."),
  "module.module._orig_mod.": wrapped("module.module._orig_mod.", "."),
  "_orig_mod within": wrapped("", "._orig_mod."),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_as_other_software_writes_them(model, autoencoder, tmp_path, name):
  model.to_official(tmp_path / "hub")
  shutil.copytree(autoencoder, tmp_path / "pipeline" / "vae")
  (tmp_path / "pipeline" / "model_index.json").write_text("{}")
  CHANGES[name](tmp_path / "hub", hub.WEIGHTS[0])
  CHANGES[name](tmp_path / "pipeline" / "vae", hub.WEIGHTS[1])
  assert_same(model, flextok_jax.load(tmp_path / "hub", **LOAD))
  vae = flextok_jax.load(tmp_path / "pipeline")
  jax.tree.map(np.testing.assert_array_equal, vae.params["vae"], model.params["vae"])
  if name == "shards":
    assert_same(model, flextok_jax.load(tmp_path / "hub" / "model.safetensors.index.json", **LOAD))
    (tmp_path / "hub" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002.safetensors; needed are"):
      flextok_jax.load(tmp_path / "hub", **LOAD)


def test_files_that_are_not_read_are_named_with_the_remedy(autoencoder, tmp_path):
  config = (autoencoder / "config.json").read_text()
  convert = "convert it by python -m flextok_jax.convert"
  for name, words in {
    "diffusion_pytorch_model.bin": f"diffusion_pytorch_model.bin is not supported, as a pickled .*: {convert}",
    "flax_model.msgpack": "flax_model.msgpack is not supported: save the model as safetensors",
  }.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(config)
    (tmp_path / name / name).write_bytes(b"PK\3\4")
    with pytest.raises(FileNotFoundError, match=words):
      flextok_jax.load(tmp_path / name)
  with pytest.raises(ValueError, match=f"is not a whole safetensors file .*: if it is PyTorch's, {convert}"):
    flextok_jax.load(tmp_path / "diffusion_pytorch_model.bin" / "diffusion_pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match="but has folders of models: give one of diff.*bin, flax_model.msgpack"):
    flextok_jax.load(tmp_path)
  save_file({"a.x": np.zeros(1, np.float32), "a._orig_mod.x": np.zeros(1, np.float32)}, tmp_path / "two.safetensors")
  with pytest.raises(ValueError, match="tensors 'a.*' and 'a.*' are the same parameter: save one of them"):
    flextok_jax.load(tmp_path / "two.safetensors")


# The hub.


def cached(cache: Path, repository: str, files: Path):
  """Copies files into a cache with the layout of huggingface_hub."""
  folder = cache / f"models--{repository.replace('/', '--')}"
  snapshot = folder / "snapshots" / ("0" * 40)
  snapshot.mkdir(parents=True)
  (folder / "refs").mkdir()
  (folder / "refs" / "main").write_text("0" * 40)
  shutil.copytree(files, snapshot, dirs_exist_ok=True)


@pytest.fixture
def offline(tmp_path, monkeypatch):
  """Sets an empty cache and disables the network."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return tmp_path / "cache"


def test_a_cached_repository_loads_offline(model, autoencoder, offline, tmp_path):
  model.to_official(tmp_path / "hub")
  cached(offline, "EPFL-VILAB/flextok_tiny", tmp_path / "hub")
  assert_same(model, flextok_jax.load("EPFL-VILAB/flextok_tiny", **LOAD))
  cached(offline, "EPFL-VILAB/flextok_vae", autoencoder)
  assert flextok_jax.load("EPFL-VILAB/flextok_vae").config.stage == "vae"
  cached(offline, "some/pipeline", autoencoder.parent)
  assert flextok_jax.load("some/pipeline").config.stage == "vae"


def test_vae_by_repository_name(model, autoencoder, offline, tmp_path):
  """The weights lack the VAE and the config names its repository, which also provides the scaling factor."""
  model.to_official(tmp_path / "hub")
  config = json.loads((tmp_path / "hub" / "config.json").read_text())
  weights = {k: v for k, v in load_file(tmp_path / "hub" / hub.WEIGHTS[0]).items() if not k.startswith("vae.")}
  save_file(weights, tmp_path / "hub" / hub.WEIGHTS[0])
  write = lambda **vae: (tmp_path / "hub" / "config.json").write_text(json.dumps(config | {"vae": config["vae"] | vae}))
  write(hf_hub_path="EPFL-VILAB/flextok_vae", scaling_factor=None)
  with pytest.raises(FileNotFoundError, match="EPFL-VILAB/flextok_vae is no file or folder here"):
    flextok_jax.load(tmp_path / "hub", **LOAD)
  cached(offline, "EPFL-VILAB/flextok_vae", autoencoder)
  again = flextok_jax.load(tmp_path / "hub", **LOAD)
  assert_same(model, again)
  assert again.config.vae.scaling_factor == model.config.vae.scaling_factor
  write(hf_hub_path="../../etc/passwd")
  with pytest.raises(ValueError, match="hf_hub_path .* is no repository"):
    flextok_jax.load(tmp_path / "hub", **LOAD)
  write()
  with pytest.raises(ValueError, match="no whole series of tensors vae|no whole series of tensors encoder.down_blocks"):
    flextok_jax.load(tmp_path / "hub", **LOAD)


def test_an_uncached_repository_offline_is_a_one_line_error(offline):
  with pytest.raises(FileNotFoundError) as error:
    flextok_jax.load("EPFL-VILAB/flextok_d18_d28_dfn")
  line = str(error.value)
  assert "\n" not in line and len(line) < 600
  for part in ("config.json", "model.safetensors", "https://huggingface.co/EPFL-VILAB/flextok_d18_d28_dfn", "folder"):
    assert part in line


@pytest.mark.parametrize("source", ["runs/absent.safetensors", "./absent", "/absent", "a/b/c", "absent", ""])
def test_invalid_repository_names_are_not_looked_up(offline, source):
  with pytest.raises(FileNotFoundError, match="no such checkpoint"):
    flextok_jax.load(source)
