"""Whole runs of stage "ar" on tiny token shards: what they write, and what stops them."""

import json
import shutil

from flax.core.meta import unbox
import jax
from ml_collections import FrozenConfigDict
import numpy as np
import pytest
from safetensors.numpy import load_file

import flextok_jax
from flextok_jax import evaluate, train
from flextok_jax.config import derive
from flextok_jax.data.text import make_tokenizer
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs
from tests.support import t5_reference, token_shards
from tests.support.caption_tokenizers import word_level
from tests.support.commands import run as run_command
from tests.support.token_shards import IDS, TOKENS

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  root = tmp_path_factory.mktemp("ar")
  pictures = token_shards.make_pictures(root / "pictures")
  for split in ("train", "validation"):
    token_shards.write(root / "shards", token_shards.config(pictures), split=split, num_shards=1)
  return root / "shards"


def config_of(written, **overrides):
  ar = dict(width=32, depth=2, head_dim=16, num_ids=IDS, num_tokens=TOKENS, num_classes=3) | overrides.pop("ar", {})
  text = dict(encoder="bytes", max_length=8, features=32, mlp_hidden=32, depth=1, head_dim=16)
  settings = dict(
    num_steps=12, log_every=4, checkpoint_every=6, eval_every=6, keep_checkpoints=2, keep_period=0, tensorboard=False
  ) | overrides.pop("train", {})
  return derive(
    stage="ar",
    dtype="float32",
    ar=ar,
    text=text,
    train=settings,
    data=dict(tokens=str(written), global_batch=8, num_threads=2, prefetch=1) | overrides.pop("data", {}),
    optim=dict(learning_rate=1e-2, warmup_steps=2, ema_decay=0.9),
    eval=dict(num_images=7, batch_size=4),
    **overrides,
  )


@pytest.fixture(scope="module")
def run(written, tmp_path_factory):
  """A text-conditional run with a stop token: (config, workdir)."""
  workdir = tmp_path_factory.mktemp("run")
  config = config_of(written, ar=dict(condition="text", stop=True))
  train.train(config, str(workdir))
  return config, workdir


def read_metrics(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_reports(run):
  _, workdir = run
  rows = read_metrics(workdir)
  losses = [row["loss"] for row in rows if "loss" in row]
  assert len(losses) == 4 and losses[-1] < losses[0] < 1.5 * np.log(IDS)
  assert {"loss_to_1", "loss_to_2", "loss_to_4"} <= set(rows[0])
  held_out = [row for row in rows if "eval/loss" in row]
  assert [row["step"] for row in held_out] == [6, 12] and {"eval/loss_1", "eval/loss_4"} <= set(held_out[0])
  folder = workdir / "eval" / "00000012"
  assert {path.name for path in folder.iterdir()} == {"report.json", "loss.png"}
  report = json.loads((folder / "report.json").read_text())
  assert report["num_sequences"] == 7 and len(report["by_position"]) == TOKENS
  # A sequence of length n has n tokens and, if it ends early, a stop.
  assert report["by_position"][0]["count"] == 7 and report["by_position"][-1]["count"] <= 7
  places = [(place["loss"], place["count"]) for place in report["by_position"] if place["count"]]
  mean = sum(loss * count for loss, count in places) / sum(count for _, count in places)
  assert report["loss"] == pytest.approx(mean)


def test_weights_generate_and_identify_their_tokenizer(run):
  _, workdir = run
  gen = flextok_jax.load_ar(workdir / "weights.safetensors", "float32")
  assert gen.config.ar.tokenizer == token_shards.TOKENIZER["fingerprint"]
  ids = gen.generate(jax.random.key(0), prompts=["a", "b c"], guidance_scale=2.0)
  assert ids.shape == (2, TOKENS) and all(1 <= len(row) <= TOKENS for row in gen.trim(ids))
  again = flextok_jax.load_ar(workdir, "float32")  # the newest checkpoint's average, in float32
  tokens = np.zeros((1, TOKENS), np.int32)
  np.testing.assert_allclose(gen.logits(tokens), again.logits(tokens), atol=0.1)  # bfloat16 rounding


def test_evaluate_command_measures_the_same(run, tmp_path):
  config, workdir = run
  run_command(evaluate, f"--workdir={workdir}", f"--out={tmp_path}")
  report = json.loads((tmp_path / "report.json").read_text())
  in_run = json.loads((workdir / "eval" / "00000012" / "report.json").read_text())
  assert report["loss"] == pytest.approx(in_run["loss"], abs=1e-5) and report["checkpoint"] == str(workdir)
  with pytest.raises(ValueError, match="--sources has no meaning for a generator"):
    run_command(evaluate, f"--workdir={workdir}", f"--out={tmp_path}", "--sources=synthetic")


def test_a_resumed_run_ends_like_an_uninterrupted_one(run, tmp_path):
  config, workdir = run
  parts = tmp_path / "parts"
  shutil.copytree(workdir, parts)
  shutil.rmtree(parts / "checkpoints" / "12")
  (parts / "weights.safetensors").unlink()
  train.train(config, str(parts))
  whole, resumed = (load_file(path / "weights.safetensors") for path in (workdir, parts))
  assert whole.keys() == resumed.keys()
  for name, array in whole.items():
    np.testing.assert_array_equal(array, resumed[name], err_msg=name)


def test_shards_of_another_tokenizer_are_refused(run, tmp_path):
  config, workdir = run
  with pytest.raises(ValueError, match="0123456789abcdef.*ar.tokenizer is feedfeedfeedfeed"):
    train.train(config_of(config.data.tokens, ar=dict(tokenizer="feedfeedfeedfeed")), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()
  other = json.loads((workdir / "config.json").read_text())
  other["ar"]["tokenizer"] = "feedfeedfeedfeed"  # as if the workdir's run had used tokens of another one
  moved = tmp_path / "moved"
  moved.mkdir()
  (moved / "config.json").write_text(json.dumps(other))
  with pytest.raises(ValueError, match="ar.tokenizer is 'feedfeedfeedfeed' there and '0123456789abcdef' here"):
    train.train(config, str(moved))


def test_class_conditional_training(written, tmp_path):
  train.train(config_of(written, train=dict(num_steps=2, log_every=1)), str(tmp_path))
  gen = flextok_jax.load_ar(tmp_path, "float32")
  assert gen.generate(jax.random.key(0), [0, 2]).shape == (2, TOKENS) and gen.stop_id is None


@pytest.mark.parametrize(
  "settings, pattern",
  [
    (dict(data=dict(tokens="")), "set data.tokens to a folder"),
    (dict(ar=dict(num_ids=150)), "set ar.num_ids=200"),
    (dict(ar=dict(num_classes=16)), "set ar.num_classes=3"),
    (dict(ar=dict(drop_condition=1.0)), r"ar.drop_condition must be .* in \[0, 1\), got 1.0"),
  ],
)
def test_bad_settings_are_one_line(written, tmp_path, settings, pattern):
  with pytest.raises(ValueError, match=pattern):
    train.train(config_of(written, **settings), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_t5_features_are_computed_outside_the_state(written, tmp_path):
  """A frozen T5 turns text ids into features on the devices; the state excludes it, a generator loads it itself."""
  folder = t5_reference.write(tmp_path / "t5", t5_reference.tensors())
  word_level(folder)
  config = config_of(written, ar=dict(condition="text"))
  config.text.update(dict(encoder="t5", path=str(folder), features=t5_reference.CONFIG["d_model"]))
  mesh = sharding.make_mesh()
  batch = next(sharding.device_batches(inputs.train_batches(config, 0, mesh), sharding.batch_sharding(mesh)))
  prepared = inputs.make_prepare(config, mesh)(batch)
  assert set(batch) - set(prepared) == {"text_ids"} and set(prepared) - set(batch) == {"text_features"}
  assert prepared["text_features"].shape == (8, 8, config.text.features)

  stage = make_stage(config)
  params, frozen = unbox(jax.jit(stage.init)(jax.random.key(0)))
  assert set(params) == {"ar", "text_mlp"} and not frozen
  loss, metrics = jax.jit(stage.loss_fn)(params, prepared, jax.random.key(0), 0)
  assert float(loss) == pytest.approx(float(metrics["loss"][0] / metrics["loss"][1]), rel=1e-6)

  gen = flextok_jax.ARGenerator(params, FrozenConfigDict(config))
  rows = {
    tuple(ids): features for ids, features in zip(np.asarray(batch["text_ids"]).tolist(), prepared["text_features"])
  }
  tokenizer = make_tokenizer(config.text.encoder, config.text.max_length, config.text.path)
  for caption in ("a", "b", "c"):
    ids, lengths = tokenizer([caption])
    if tuple(ids[0].tolist()) in rows:
      features, _ = gen.encode_text([caption])
      np.testing.assert_allclose(features[0, : lengths[0]], rows[tuple(ids[0].tolist())][: lengths[0]], atol=1e-5)
      break
  else:
    pytest.fail("no caption of the batch is known")
