"""Latent shards: VAE moments of images, for training without running the VAE's encoder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax import tokenize, train
from flextok_jax.core.images import to_float
from flextok_jax.data.shards import files, latents
from flextok_jax.data.shards.files import ArrayRecords
from flextok_jax.data.shards.latents import LatentShards
from flextok_jax.data.shards.split_images import SplitImages
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.stages.vae import make_vae
from flextok_jax.training import inputs
from flextok_jax.training.inputs import image_data
from flextok_jax.weights import fingerprints, loading, saving
from tests.support.commands import config_file, fails, run
from tests.support.tiny import VAE, make_params, tiny_config
from tests.support.tiny import latent_config as config
from tests.support.token_shards import SIZE, make_pictures, write_records

SHAPE = [SIZE // 2, SIZE // 2, 8]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "weights.safetensors"
  saving.save_weights(str(path), config(), make_params(make_stage(config())))
  return path


@pytest.fixture(scope="module")
def vae(tokenizer, tmp_path_factory):
  """Returns the tokenizer's VAE on its own, in bfloat16."""
  path = tmp_path_factory.mktemp("vae") / "weights.safetensors"
  saving.save_weights(str(path), config(stage="vae"), {"vae": loading.load(tokenizer)[1]["vae"]}, "bfloat16")
  return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  pictures = make_pictures(tmp_path_factory.mktemp("pictures"))
  folder = dict(weight=1.0, path=str(pictures), val_path=str(pictures.parent / "validation"))
  return dict(num_threads=2, prefetch=1, global_batch=8, sources=dict(tfds=dict(weight=0.0), folder=folder))


@pytest.fixture(scope="module")
def written(tokenizer, data, tmp_path_factory):
  """Returns {dtype: shards of all pictures, three copies each}, written by the command."""
  out = tmp_path_factory.mktemp("latents")
  given = "--what=latents", f"--checkpoint={tokenizer}", f"--config={config_file(out / 'data.py', data=data)}"
  run(tokenize, *given, f"--out={out / 'float16'}", "--copies=3", "--shards=2", "--batch_size=8")
  run(tokenize, *given, f"--out={out / 'bfloat16'}", "--copies=3", "--dtype=bfloat16", "--batch_size=16")
  return {dtype: out / dtype for dtype in files.DTYPES}


def train_config(data, written, dtype="float16", **overrides):
  return config(data=data | dict(latents=str(written[dtype])), **overrides)


@pytest.fixture(scope="module")
def crops(tokenizer, data):
  """Returns (elements of SplitImages, moments of all their crops in float32)."""
  cfg, params = loading.load(tokenizer)
  images = SplitImages(image_data(config(data=data)), "train", seed=0, image_size=SIZE, copies=3)
  elements = [images[i] for i in range(23)]
  encode = jax.jit(lambda x: make_vae(cfg).apply({"params": params["vae"]}, to_float(x), method="encode"))
  return elements, np.concatenate(encode(np.concatenate([element["crops"] for element in elements])), -1)


@pytest.mark.parametrize("dtype", files.DTYPES)
def test_records_are_moments_of_the_training_crops(tokenizer, crops, written, dtype):
  read, (elements, moments) = LatentShards(written[dtype]), crops
  assert len(read) == read.meta["num_records"] == 3 * 23 and read.meta["copies"] == 3
  assert (read.meta["dtype"], read.meta["shape"], read.meta["image_size"]) == (dtype, SHAPE, SIZE)
  assert read.meta["fingerprint"] == fingerprints.vae(*loading.load(tokenizer))
  for i in range(69):
    record, element = read[i], elements[i // 3]
    assert record["moments"].dtype == jnp.dtype(dtype) and list(record["moments"].shape) == SHAPE
    # Rounding to the type, half a unit in the last place, plus float32 differences of the VAE between batch shapes.
    eps = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(record["moments"].astype(np.float32), moments[i], rtol=1.01 * eps, atol=1e-4)
    assert (record["label"], record["captions"]) == (element["label"], element["captions"])


@pytest.mark.parametrize("dtype", files.DTYPES)
def test_batches_depend_only_on_seed_and_step(data, written, dtype):
  cfg = train_config(data, written, dtype)

  def steps(count, cfg=cfg, **kwargs):
    loading, options = image_data(cfg).loading, dict(seed=cfg.seed, global_batch=cfg.data.global_batch) | kwargs
    batches = latents.train_batches(LatentShards(cfg.data.latents), loading, **options)
    return [next(batches) for _ in range(count)]

  def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)

  reference = steps(3)
  assert {k: (v.shape, v.dtype.name) for k, v in reference[0].items()} == {
    "latents": ((8, *SHAPE), dtype),
    "label": ((8,), "int32"),
    "num_objects": ((8,), "int32"),
    "unreadable": ((8,), "int32"),
  }
  assert not equal(reference[0], reference[1]) and equal(steps(1, start_step=2)[0], reference[2])
  parts = [steps(1, start_step=1, process_index=p, process_count=2)[0] for p in range(2)]
  assert equal({k: np.concatenate([part[k] for part in parts]) for k in parts[0]}, reference[1])
  assert not equal(steps(1, train_config(data, written, dtype, seed=1))[0], reference[0])
  if dtype == "bfloat16":  # numpy does not support it natively
    assert equal(steps(1, train_config(data | dict(num_workers=1), written, dtype))[0], reference[0])
  records = LatentShards(written[dtype])
  epoch = steps(1, train_config(data | dict(global_batch=69), written, dtype))[0]
  assert sorted(x.tobytes() for x in epoch["latents"]) == sorted(records[i]["moments"].tobytes() for i in range(69))


@pytest.mark.parametrize("sample, dtype", [(False, "float16"), (True, "bfloat16")])
def test_loss_equals_that_of_the_images(tokenizer, crops, data, written, sample, dtype):
  """Up to rounding in the stored type; also when sampling the posterior, since the noise is the same."""
  cfg = train_config(data, written, dtype, vae=VAE | dict(sample_posterior=sample), fast=False)  # compiles sooner
  stage, params = make_stage(cfg), loading.load(tokenizer)[1]
  records = LatentShards(written[dtype])
  batches = {
    "image": np.concatenate([crops[0][i]["crops"] for i in (3, 8)]),
    "latents": np.stack([records[3 * i + copy]["moments"] for i in (3, 8) for copy in range(3)]),
  }
  loss_fn = jax.jit(lambda batch: stage.loss_fn(params, batch, jax.random.key(0), 0)[0])
  one, other = (float(loss_fn({name: batch})) for name, batch in batches.items())
  eps = float(jnp.finfo(dtype).eps)
  assert one > 0.5 and 0 < abs(one - other) < eps * one


def test_fingerprint_depends_only_on_the_encoder(tokenizer, vae):
  (cfg, params), own = loading.load(tokenizer), fingerprints.vae(*loading.load(vae))
  assert fingerprints.vae(cfg, params) == own and len(own) == 16
  changed = lambda part: {"vae": params["vae"] | {part: jax.tree.map(lambda x: x * 1.02, params["vae"][part])}}
  for part, same in (("encoder", False), ("quant_conv", False), ("decoder", True), ("post_quant_conv", True)):
    assert (fingerprints.vae(cfg, changed(part)) == own) == same
  assert fingerprints.vae(config(vae=VAE | dict(scaling_factor=2.0, sample_posterior=False)), params) == own
  assert fingerprints.vae(config(vae=VAE | dict(norm_groups=2)), params) != own
  mesh = jax.make_mesh((8,), ("data",))
  split = jax.device_put(params["vae"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
  assert fingerprints.vae(cfg, {"vae": split}) == own


@pytest.mark.parametrize(
  "pattern, fingerprint, overrides",
  [
    ("of VAE ([0-9a-f]{16}), but this VAE is cafe: write latents with that VAE", "cafe", {}),
    ("images of 16 px, but image_size is 32: set image_size=16", None, dict(image_size=32)),
    ("have 4 channels, but vae.latent_channels is 8", None, dict(vae=VAE | dict(latent_channels=8))),
    ("vae.kind 'pixels' needs no latent shards", None, dict(vae=dict(kind="pixels"))),
  ],
  ids=["vae", "size", "channels", "pixels"],
)
def test_incompatible_latents_are_refused(data, written, pattern, fingerprint, overrides):
  cfg = train_config(data, written, **overrides)
  with pytest.raises(ValueError, match=pattern) as caught:
    if fingerprint is None:
      inputs.train_batches(cfg, 0, sharding.make_mesh(devices=jax.devices()[:1]))
    else:
      latents.open_latents(written["float16"], image_size=SIZE, latent_channels=4, fingerprint=fingerprint)
  assert "\n" not in str(caught.value)


def test_latents_of_the_same_vae_are_accepted(vae, data, written):
  inputs.check_latents(train_config(data, written), loading.load(vae)[1])


def test_a_run_trains_on_latents_and_refuses_those_of_another_vae(tokenizer, data, written, tmp_path):
  settings = dict(
    train=dict(num_steps=2, log_every=1),
    eval=dict(sources=("folder",), num_images=4, batch_size=4, grid_images=1, num_tokens=(4,)),
    sampler=dict(num_steps=1, guidance="none"),
  )
  cfg = train_config(data, written, init_from=str(tokenizer), fast=False, **settings)
  train.train(cfg, str(tmp_path / "run"))
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines if "loss" in x] == [1, 2] and all(x["loss"] > 0 for x in lines if "loss" in x)
  params = loading.load(tokenizer)[1]
  params["vae"] = jax.tree.map(lambda x: x + 1, params["vae"])
  saving.save_weights(str(tmp_path / "other.safetensors"), config(), params)
  other = train_config(data, written, init_from=str(tmp_path / "other.safetensors"), **settings)
  with pytest.raises(ValueError, match="the latent shards are of VAE .*, but this VAE is"):
    train.train(other, str(tmp_path / "other"))
  assert not (tmp_path / "other" / "config.json").exists()


def test_bad_input_is_one_line(vae, data, tmp_path):
  file = config_file(tmp_path / "data.py", data=data)
  given = "--what=latents", f"--config={file}", f"--out={tmp_path / 'out'}"
  for flag in ("--num_tokens=1", "--quality=0.1"):
    fails("has no meaning for --what=latents", tokenize, *given, f"--checkpoint={vae}", flag)
  pixels = tmp_path / "pixels.safetensors"
  saving.save_weights(str(pixels), tiny_config(), make_params(make_stage(tiny_config())))
  fails(
    "a model of stage 'tokenizer' without a VAE has no latents to write", tokenize, *given, f"--checkpoint={pixels}"
  )
  facts = dict(fingerprint="f", compute_dtype="float32", image_size=SIZE, dtype="float16", shape=[1])
  for value, pattern in (
    (np.float16(np.inf), "moments are not finite in float16: use dtype bfloat16"),
    (np.float32(0), r"moments are float32 \[1\], not float16 \[1\]"),
  ):
    kind = ArrayRecords(LatentShards, lambda images, value=value: np.full((len(images), 1), value), facts, 4)
    with pytest.raises(ValueError, match=pattern):
      write_records(tmp_path / "out", kind, config(data=data))
  with pytest.raises(FileNotFoundError, match=r"no latent shards of split 'train'.*tokenize --what=latents"):
    LatentShards(tmp_path / "absent")
