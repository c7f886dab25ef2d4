"""Shards of crops of several shapes: latents, teacher features and tokens, and training on them."""

import functools
import json

import jax
import numpy as np
from PIL import Image
import pytest

from flextok_jax import tokenize
from flextok_jax.data import transforms
from flextok_jax.data.shards.features import FeatureShards, LatentsWithFeatures
from flextok_jax.data.shards.files import META
from flextok_jax.data.shards.latents import LatentShards, train_batches
from flextok_jax.data.shards.split_images import SplitImages
from flextok_jax.data.shards.tokens import TokenShards, unpack
from flextok_jax.inference.tokenizer import load
from flextok_jax.ops import repa
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs, loop, teacher
from flextok_jax.weights import saving
from tests.data.test_pipeline import equal
from tests.support import vit_reference
from tests.support.commands import config_file, fails, run
from tests.support.tiny import latent_config, make_params
from tests.support.token_shards import SIZE
from tests.training.test_loop import NoEvaluation

SHAPES = ((16, 16), (8, 24))
SIZES = [(40, 40), (20, 60), (41, 40), (22, 64), (38, 40), (18, 50), (40, 43)]  # four and three
FEATURES = 32
SCALED = dict(width=32, depth=1, head_dim=16, patch_size=2, posemb_scaling="scaled")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Pictures of two aspect ratios, a tokenizer and a tiny DINOv2, and their shards."""
  root = tmp_path_factory.mktemp("shapes")
  rng = np.random.default_rng(0)
  for split in ("train", "validation"):
    (root / split / "a").mkdir(parents=True)
    for i, (height, width) in enumerate(SIZES):
      pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
      Image.fromarray(pixels).resize((width, height)).save(root / split / "a" / f"{i}.png")
  saving.save_weights(str(root / "weights.safetensors"), config(), make_params(make_stage(config())))
  (root / "dino_weights").mkdir()
  vit_reference.write("registers", root / "dino_weights")
  given = f"--config={config_file(root / 'data.py', **settings(root))}", "--batch_size=4"
  checkpoint = f"--checkpoint={root / 'weights.safetensors'}"
  run(tokenize, "--what=latents", checkpoint, *given, f"--out={root / 'latents'}", "--copies=2", "--shards=3")
  run(tokenize, "--what=dino", *given, f"--out={root / 'dino'}", "--copies=2", "--shards=2")
  run(tokenize, checkpoint, *given, f"--out={root / 'tokens'}")
  return root


def config(**overrides):
  return latent_config(encoder=SCALED, decoder=SCALED, **overrides)


def settings(root, **data):
  folder = dict(weight=1.0, path=str(root / "train"), val_path=str(root / "validation"))
  sources = dict(tfds=dict(weight=0.0), folder=folder)
  return dict(
    data=dict(num_threads=2, prefetch=1, global_batch=8, shapes=SHAPES, sources=sources) | data,
    repa=dict(weight=1.0, hidden=16, teacher=str(root / "dino_weights"), features=FEATURES, dtype="float32"),
    eval=dict(sources=("folder",)),
  )


def of_shards(root, **data):
  shards = dict(latents=str(root / "latents"), teacher=str(root / "dino"))
  return config(**settings(root, **(shards | data)))


def test_images_are_in_the_order_of_their_shapes(root):
  images = SplitImages(inputs.image_data(of_shards(root)), "train", seed=0, image_size=SIZE, copies=2)
  assert images.groups == [((16, 16), 4), ((8, 24), 3)]
  order = [0, 2, 4, 6, 1, 3, 5]
  for i, number in enumerate(order):
    shape = SHAPES[i >= 4]
    assert images[i]["size"] == shape and images[i]["crops"].shape == (2, *shape, 3)
    expected = transforms.center_crop(root / "train" / "a" / f"{number}.png", shape)
    np.testing.assert_array_equal(images[i]["crops"][0], expected)


def test_images_take_turns_by_weight_if_shapes_have_weights(root):
  cfg = config(**settings(root, shape_weights=(5, 2)))
  images = SplitImages(inputs.image_data(cfg), "train", seed=0, image_size=SIZE)
  assert images.groups == [((16, 16), 5), ((8, 24), 2)]
  crops = [images[i]["crops"][0] for i in range(7)]
  numbers = [
    number
    for crop in crops
    for number in range(7)
    if np.array_equal(crop, transforms.center_crop(root / "train" / "a" / f"{number}.png", crop.shape[:2]))
  ]
  assert sorted(numbers) == list(range(7))


def test_records_have_the_shapes_of_their_images(root):
  model = load(root / "weights.safetensors")
  latents, features, tokens = (
    kind(root / name) for kind, name in ((LatentShards, "latents"), (FeatureShards, "dino"), (TokenShards, "tokens"))
  )
  assert [len(shards) for shards in (latents, features, tokens)] == [14, 14, 7]
  for shards, copies in ((latents, 2), (features, 2), (tokens, 1)):
    assert {shape: rows.tolist() for shape, rows in shards.by_shape().items()} == {
      (16, 16): list(range(4 * copies)),
      (8, 24): list(range(4 * copies, 7 * copies)),
    }
  assert latents.meta["shard_shapes"] == [[16, 16], [16, 16], [8, 24]] and latents.meta["shape"] == [8, 8, 8]
  for i in range(14):
    height, width = SHAPES[i >= 8]
    assert latents[i]["size"] == features[i]["size"] == (height, width)
    assert latents[i]["moments"].shape == (height // 2, width // 2, 8)
    assert features[i]["features"].shape == (height // 4 * (width // 4), FEATURES)
  images = SplitImages(inputs.image_data(config(**settings(root))), "train", seed=0, image_size=SIZE)
  for i in (0, 5):
    crop = images[i]["crops"]
    assert tokens[i]["size"] == crop.shape[1:3]
    np.testing.assert_array_equal(tokens[i]["ids"], np.asarray(model.tokenize(crop))[0])
    moments = np.asarray(model.encode_latents(crop))[0] / 0.5  # vae.scaling_factor
    np.testing.assert_allclose(latents[2 * i]["moments"][..., :4], moments, rtol=2e-3, atol=2e-3)


def test_features_of_a_shape_have_its_grid(root):
  """Those of a wide image are of the image resized to the patches of its grid."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  given = teacher.read_teacher(str(root / "dino_weights"), FEATURES)
  make = functools.partial(teacher.make_features_fn, *given, mesh, dtype="float32")
  wide = np.random.default_rng(0).integers(0, 256, (2, 8, 24, 3), np.uint8)
  found = make(grid=4, image_size=16)(wide)
  assert found.shape == (2, 12, FEATURES)
  square = make(grid=4)(wide)
  assert square.shape == (2, 16, FEATURES)
  images = wide[:, :, :8]
  np.testing.assert_array_equal(make(grid=4, image_size=16)(images), make(grid=2)(images))


def test_features_of_a_wide_grid_are_resized_bilinearly():
  x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
  np.testing.assert_array_equal(repa.resize_features(x, 1, 3, (1, 3)), x)
  doubled = repa.resize_features(x, 2, 3, (1, 3)).reshape(2, 2, 3, 5)
  np.testing.assert_allclose(doubled, np.stack([x, x], 1), rtol=1e-6)
  with pytest.raises(ValueError, match="3 features do not form a grid of 2 x 2"):
    repa.resize_features(x, 2, 2, (2, 2))
  assert repa.scaled_grid(16, 256, (256, 128)) == (16, 8) and repa.scaled_grid(3, 32, (4, 96)) == (1, 9)


def test_batches_of_shards_have_one_shape_and_depend_only_on_seed_and_step(root):
  cfg = of_shards(root)
  records = LatentsWithFeatures(LatentShards(root / "latents"), FeatureShards(root / "dino"), grid=4, width=FEATURES)
  options = dict(seed=0, global_batch=8)

  def steps(count, **given):
    batches = train_batches(records, inputs.image_data(cfg).loading, **options, **given)
    return [next(batches) for _ in range(count)]

  whole = steps(7)
  shapes = [(batch["latents"].shape, batch["teacher"].shape) for batch in whole]
  square, wide = ((8, 8, 8, 8), (8, 16, FEATURES)), ((8, 4, 12, 8), (8, 12, FEATURES))
  assert shapes.count(square) == 4 and shapes.count(wide) == 3
  place = {records[i]["moments"].tobytes(): i for i in range(14)}
  for batch in whole:
    for row, features in zip(batch["latents"], batch["teacher"]):
      np.testing.assert_array_equal(features, records[place[row.tobytes()]]["teacher"])
  halves = [steps(7, process_index=i, process_count=2) for i in range(2)]
  for i, batch in enumerate(whole):
    assert equal({name: np.concatenate([half[i][name] for half in halves]) for name in batch}, batch)
    assert equal(steps(1, start_step=i)[0], batch)


def test_a_run_trains_on_shards_of_several_shapes(root, tmp_path, capsys):
  cfg = of_shards(root)
  cfg.update(init_from=str(root / "weights.safetensors"), fast=False)
  cfg.train.update(num_steps=4, log_every=1)
  loop.train(cfg, str(tmp_path / "run"), lambda *args: (NoEvaluation(), lambda params: {}))
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [-1 <= x["repa"] <= 1 and np.isfinite(x["loss"]) for x in lines if "loss" in x] == [True] * 4
  out = capsys.readouterr().out
  assert "compiled update 2 of 2" in out and "8 x 24    42.9%         6" in out and "4 x 12 latents" in out


def test_a_run_computes_the_features_of_several_shapes(root, tmp_path):
  cfg = config(**settings(root))
  cfg.update(init_from=str(root / "weights.safetensors"), fast=False)
  cfg.train.update(num_steps=3, log_every=1)
  loop.train(cfg, str(tmp_path / "run"), lambda *args: (NoEvaluation(), lambda params: {}))
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [-1 <= x["repa"] <= 1 for x in lines if "loss" in x] == [True] * 3


def test_other_shapes_are_refused(root, tmp_path):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for shapes, words in (
    ((), r"images of the shapes \(8, 24\), \(16, 16\): set data.shapes=\(\(8, 24\), \(16, 16\),\)"),
    (((16, 16),), "images of the shapes"),
  ):
    with pytest.raises(ValueError, match=words) as caught:
      inputs.train_batches(of_shards(root, shapes=shapes), 0, mesh)
    assert "\n" not in str(caught.value)
  file = config_file(tmp_path / "data.py", **settings(root))
  given = f"--checkpoint={root / 'weights.safetensors'}", f"--config={file}"
  fails("writes paths of one shape: set", tokenize, "--what=trajectories", *given, f"--out={tmp_path / 'paths'}")
  other = config_file(tmp_path / "other.py", **settings(root, shapes=SHAPES[:1]))
  given = "--what=latents", f"--checkpoint={root / 'weights.safetensors'}", f"--config={other}", "--copies=2"
  fails("begun with other settings: shapes is", tokenize, *given, f"--out={root / 'latents'}")


def test_damaged_shapes_are_one_line(root, tmp_path):
  folder = tmp_path / "latents" / "train"
  folder.mkdir(parents=True)
  for path in (root / "latents" / "train").iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  meta = json.loads((folder / META).read_text())
  for shapes in ([[16, 16]], [[16, 16], [16, 16], [8]], [[16, 16], [0, 16], [8, 24]], "x"):
    (folder / META).write_text(json.dumps(meta | dict(shard_shapes=shapes)))
    with pytest.raises(ValueError, match="does not describe latent shards .shard_shapes is") as caught:
      LatentShards(tmp_path / "latents")
    assert "\n" not in str(caught.value)
  (folder / META).write_text(json.dumps(meta | dict(shard_shapes=[[16, 16], [8, 24], [8, 24]])))
  assert LatentShards(tmp_path / "latents")[0]["size"] == (16, 16)
  with pytest.raises(ValueError, match=r"record 4 cannot be read .its size is \(16, 16\), that of its file \[8, 24\]"):
    LatentShards(tmp_path / "latents")[4]
  data = TokenShards.pack(dict(ids=[1], length=1, size=(8, 24), label=0, num_objects=-1, captions=[]))
  assert unpack(data)["size"] == (8, 24)
  with pytest.raises(ValueError, match="size .* is not a shape of 2 numbers"):
    unpack(TokenShards.pack(dict(ids=[1], length=1, size=(8, 0), label=0, num_objects=-1, captions=[])))
