"""Teacher features in shards next to latents: same crops and loss as in training; incompatible data is refused."""

import json
import shutil

from flax.core.meta import unbox
import jax
import numpy as np
import pytest

from flextok_jax import tokenize
from flextok_jax.core.images import to_float
from flextok_jax.data.shards.features import FeatureShards, LatentsWithFeatures
from flextok_jax.data.shards.files import META
from flextok_jax.data.shards.latents import LatentShards, train_batches
from flextok_jax.data.shards.split_images import SplitImages
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.stages.vae import make_vae
from flextok_jax.training import inputs, loop, teacher
from flextok_jax.weights import fingerprints, loading, saving
from tests.support import vit_reference
from tests.support.commands import config_file, fails, run
from tests.support.tiny import VAE, make_params
from tests.support.tiny import latent_config as config
from tests.support.token_shards import SIZE, make_pictures

FEATURES, GRID, IMAGES, COPIES = 32, 4, 23, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Returns a folder of pictures, a tokenizer, two tiny DINOv2, shards of latents and of both models' features."""
  root = tmp_path_factory.mktemp("teacher")
  make_pictures(root / "pictures")
  saving.save_weights(str(root / "weights.safetensors"), config(), make_params(make_stage(config())))
  for name, case in (("own", "registers"), ("other", "dinov2")):
    (root / name).mkdir()
    vit_reference.write(case, root / name)
  file = config_file(root / "data.py", data=data_of(root), **settings(root))
  given = f"--config={file}", f"--copies={COPIES}"
  run(
    tokenize,
    "--what=latents",
    f"--checkpoint={root / 'weights.safetensors'}",
    *given,
    f"--out={root / 'latents'}",
    "--shards=2",
    "--batch_size=8",
  )
  run(tokenize, "--what=dino", *given, f"--out={root / 'dino'}", "--shards=3", "--batch_size=16")
  return root


def data_of(root, **fields):
  folder = dict(weight=1.0, path=str(root / "pictures/train"), val_path=str(root / "pictures/validation"))
  return dict(num_threads=2, prefetch=1, global_batch=8, sources=dict(tfds=dict(weight=0.0), folder=folder)) | fields


def settings(root, **fields):
  repa = dict(weight=1.0, hidden=16, teacher=str(root / "own"), features=FEATURES, dtype="float32")
  return dict(repa=repa | fields)


def train_config(root, data=(), repa=(), **overrides):
  shards = dict(latents=str(root / "latents"), teacher=str(root / "dino"))
  return config(data=data_of(root, **(shards | dict(data))), **settings(root, **dict(repa)), **overrides)


@pytest.fixture(scope="module")
def crops(root):
  """Returns uint8 [46, 16, 16, 3] in record order, and the teacher's features of these crops."""
  images = SplitImages(inputs.image_data(config(data=data_of(root))), "train", seed=0, image_size=SIZE, copies=COPIES)
  crops = np.concatenate([images[i]["crops"] for i in range(IMAGES)])
  cfg = train_config(root)
  mesh, options = sharding.make_mesh(devices=jax.devices()[:1]), dict(grid=GRID, dtype="float32")
  features = teacher.make_features_fn(*teacher.read_teacher(cfg.repa.teacher, FEATURES), mesh, **options)
  return crops, np.asarray(features(crops))


def test_records_are_features_of_the_crops_behind_the_latents(root, crops):
  """Compared record by record, although files and batches differ."""
  images, want = crops
  latents, read = LatentShards(root / "latents"), FeatureShards(root / "dino")
  assert len(read) == len(latents) == IMAGES * COPIES and len(read.meta["shard_records"]) == 3
  assert (read.meta["shape"], read.meta["dtype"], read.meta["image_size"]) == ([GRID**2, FEATURES], "float16", SIZE)
  assert read.meta["fingerprint"] == fingerprints.teacher(*teacher.read_teacher(root / "own", FEATURES))
  assert (read.meta["copies"], read.meta["crop"], read.meta["flip"]) == (COPIES, "random", True)
  cfg, params = loading.load(root / "weights.safetensors")
  encode = jax.jit(lambda x: make_vae(cfg).apply({"params": params["vae"]}, to_float(x), method="encode"))
  moments = np.concatenate(encode(images), -1)
  for i in range(len(read)):
    record, other = read[i], latents[i]
    assert record["features"].dtype == np.float16
    np.testing.assert_allclose(record["features"], want[i], rtol=6e-4, atol=2e-4)
    np.testing.assert_allclose(other["moments"], moments[i], rtol=6e-4, atol=2e-4)
    assert all(record[name] == other[name] for name in ("label", "num_objects", "captions"))


def test_batches_pair_latents_with_features_and_depend_only_on_seed_and_step(root):
  latents, read = LatentShards(root / "latents"), FeatureShards(root / "dino")
  place = {latents[i]["moments"].tobytes(): i for i in range(len(latents))}
  cfg, mesh = train_config(root), sharding.make_mesh(devices=jax.devices()[:1])
  batches = inputs.train_batches(cfg, 0, mesh)
  whole = [next(batches) for _ in range(3)]
  for batch in whole:
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items() if k in ("latents", "teacher")} == {
      "latents": ((8, SIZE // 2, SIZE // 2, 8), "float16"),
      "teacher": ((8, GRID**2, FEATURES), "float16"),
    }
    for row, features in zip(batch["latents"], batch["teacher"]):
      np.testing.assert_array_equal(features, read[place[row.tobytes()]]["features"])
  again = next(inputs.train_batches(cfg, 2, mesh))
  records = LatentsWithFeatures(latents, read, grid=GRID, width=FEATURES)
  options = dict(seed=0, global_batch=8, start_step=2, process_count=2)
  loading = inputs.image_data(cfg).loading
  halves = [next(train_batches(records, loading, process_index=i, **options)) for i in range(2)]
  for name, x in whole[2].items():
    np.testing.assert_array_equal(again[name], x)
    np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), x)
  off = next(inputs.train_batches(train_config(root, repa=dict(weight=0.0)), 2, mesh))
  assert "teacher" not in off
  np.testing.assert_array_equal(off["latents"], whole[2]["latents"])  # same order with and without REPA


def test_loss_equals_that_of_features_computed_in_the_step(root, crops):
  """Up to rounding in the stored type."""
  cfg = train_config(root, dict(latents="", teacher=""), vae=VAE | dict(sample_posterior=False), fast=False)
  stage, params = make_stage(cfg), loading.load(root / "weights.safetensors")[1]
  params |= unbox(jax.jit(stage.init_auxiliary)(jax.random.key(1))[0])
  read, batch = FeatureShards(root / "dino"), {"image": crops[0][:8]}
  in_step = inputs.make_prepare(cfg, sharding.make_mesh(devices=jax.devices()[:1]), train=True)(batch)
  stored = batch | {"teacher": np.stack([read[i]["features"] for i in range(8)])}
  loss_fn = jax.jit(lambda batch: stage.loss_fn(params, batch, jax.random.key(0), 0))
  (loss, metrics), (other, others) = loss_fn(in_step), loss_fn(stored)
  assert 0 < abs(loss - other) < 1e-3 and abs(metrics["repa"][0] - others["repa"][0]) < 8e-3
  np.testing.assert_allclose(metrics["loss"], others["loss"])


def test_training_run_with_stored_features(root, tmp_path):
  cfg = train_config(
    root, init_from=str(root / "weights.safetensors"), train=dict(num_steps=2, log_every=1), fast=False
  )
  loop.train(cfg, str(tmp_path / "run"))
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [-1 <= x["repa"] <= 1 for x in lines if "loss" in x] == [True, True]


def refused(words, call):
  with pytest.raises(ValueError, match=words) as caught:
    call()
  assert "\n" not in str(caught.value)


def test_incompatible_features_are_refused(root, tmp_path):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  batches = lambda **fields: inputs.train_batches(train_config(root, **fields), 0, mesh)
  refused("features of width 32, but repa.features is 8: set repa.features=32", lambda: batches(repa=dict(features=8)))
  refused("have 16 patches per image, but this run expects 5 x 5: set repa.grid=4", lambda: batches(repa=dict(grid=5)))
  refused(
    "the teacher shards are of teacher [0-9a-f]{16}, but .*other is [0-9a-f]{16}",
    lambda: inputs.make_prepare(train_config(root, repa=dict(teacher=str(root / "other"))), mesh, train=True),
  )
  absent = train_config(root, repa=dict(teacher="facebook/dinov2-large"))  # not downloaded: its shards are enough
  batch = object()
  assert inputs.make_prepare(absent, mesh, train=True)(batch) is batch
  for name, value in (("copies", 1), ("seed", 3), ("num_images", 24)):
    out = tmp_path / name
    shutil.copytree(root / "dino", out)
    meta = json.loads((out / "train" / META).read_text()) | {name: value}
    (out / "train" / META).write_text(json.dumps(meta))
    refused(
      f"are not of the images of the latents .*: {name} is .*with the same --config and --copies",
      lambda out=out: batches(data=dict(teacher=str(out))),
    )
  records, other = LatentShards(root / "latents"), FeatureShards(root / "dino")
  pair = LatentsWithFeatures(records, other, grid=GRID, width=FEATURES)
  assert len(pair) == IMAGES * COPIES and pair[5]["teacher"].shape == (GRID**2, FEATURES)
  parse = other.parse
  other.parse = lambda data: parse(data) | {"label": 77}
  refused(r"record 5 has label \d in .* and 77 in .*, so the shards are not of the same images", lambda: pair[5])


def test_bad_input_is_one_line(root, tmp_path):
  file = config_file(tmp_path / "data.py", data=data_of(root), **settings(root))
  given = "--what=dino", f"--config={file}", f"--out={tmp_path / 'out'}"
  for flag in ("--num_tokens=1", "--quality=0.1", "--checkpoint=x"):
    fails("has no meaning for --what=dino", tokenize, *given, flag)
  missing = config_file(tmp_path / "missing.py", data=data_of(root), **settings(root, teacher=str(tmp_path / "none")))
  fails("REPA needs its teacher", tokenize, "--what=dino", f"--config={missing}", f"--out={tmp_path / 'out'}")
  with pytest.raises(FileNotFoundError, match=r"no dino shards of split 'train'.*tokenize --what=dino --config=FILE"):
    FeatureShards(tmp_path / "absent")
