"""Trajectory shards: paths of the teacher, stratified lengths, batches of whole groups, a run on them; bad input."""

import json
import shutil

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np
import pytest
from safetensors.numpy import load_file

from flextok_jax import tokenize
from flextok_jax.config import with_fields
from flextok_jax.data import pipeline
from flextok_jax.data.shards import trajectories
from flextok_jax.data.shards.split_images import SplitImages
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.models.tokenizer.flextok import Sampler, sample_latents
from flextok_jax.ops import fsq, nested
from flextok_jax.stages import make_stage
from flextok_jax.stages.tokenizer import make_model
from flextok_jax.training import inputs
from flextok_jax.training.loop import train as run_training
from flextok_jax.weights import fingerprints, loading, saving
from tests.support.commands import config_file, fails, run
from tests.support.tiny import make_params, tiny_config
from tests.support.token_shards import SIZE, make_pictures

IMAGES, COPIES, ROWS, REGISTERS = 23, 2, 4, 16
SAMPLER = dict(num_steps=5, guidance="cfg", guidance_scale=2.0)


def config_of(root, data=(), **overrides):
  folder = dict(weight=1.0, path=str(root / "pictures/train"), val_path=str(root / "pictures/validation"))
  sources = dict(tfds=dict(weight=0.0), folder=folder)
  tokens = dict(num_registers=REGISTERS, levels=(8, 5, 5), nested_dropout="pow2", bucket_rows=ROWS)
  data = dict(num_threads=2, prefetch=1, global_batch=8, sources=sources) | dict(data)
  return tiny_config(**(dict(tokens=tokens, sampler=SAMPLER, data=data) | overrides))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Returns a folder of pictures, a teacher, its trajectory shards, and another teacher."""
  root = tmp_path_factory.mktemp("trajectories")
  make_pictures(root / "pictures")
  config = config_of(root)
  params = make_params(make_stage(config))
  saving.save_weights(str(root / "teacher.safetensors"), config, params)
  other = {**params, "decoder": jax.tree.map(lambda x: 1.1 * x, params["decoder"])}
  saving.save_weights(str(root / "other.safetensors"), config, other)
  write(root, "shards", "--shards=3")
  return root


def data_file(root):
  folder = dict(weight=1.0, path=str(root / "pictures/train"), val_path=str(root / "pictures/validation"))
  return config_file(
    root / "data.py", data=dict(num_threads=2, prefetch=1, sources=dict(tfds=dict(weight=0.0), folder=folder))
  )


def write(root, out, *options):
  what = "--what=trajectories", f"--checkpoint={root / 'teacher.safetensors'}", f"--config={data_file(root)}"
  run(tokenize, *what, f"--copies={COPIES}", "--steps=1,2,4", "--batch_size=8", f"--out={root / out}", *options)


def distill_config(root, **data):
  fields = {"stage": "distill", "decoder.interval": True, "distill.steps": (1, 2, 4), "sampler.guidance": "none"}
  config = config_of(root, init_from=str(root / "teacher.safetensors"), data=data)
  return with_fields(config, fields | {"sampler.num_steps": 2})


def test_records_are_paths_of_the_teacher(root):
  """Their ends are what the sampler makes of the noise and the first keep_k ids, which are those of the crops."""
  shards = trajectories.TrajectoryShards(root / "shards")
  assert len(shards) == IMAGES * COPIES and shards.meta["shape"] == [5, SIZE, SIZE, 3]
  config = config_of(root)
  params = make_params(make_stage(config))
  assert shards.meta["fingerprint"] == fingerprints.tokenizer(config, params, decoder=True)
  records = [shards[i] for i in range(len(shards))]
  images = SplitImages(inputs.image_data(config), "train", seed=0, image_size=SIZE, copies=COPIES)
  crops = np.concatenate([images[i]["crops"] for i in range(IMAGES)])
  ids, keep_k, path = (np.stack([r[name] for r in records]) for name in ("ids", "keep_k", "path"))
  model = FlexTok(params, FrozenConfigDict(config))
  kept = np.arange(REGISTERS) < keep_k[:, None]
  np.testing.assert_array_equal(ids[kept], np.asarray(model.tokenize(crops))[kept])
  noise = path[:, 0].astype(np.float32)
  assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
  assert len(np.unique(noise.reshape(len(noise), -1)[:, 0])) == len(noise)
  network = make_model(config)
  sample = jax.jit(
    lambda p: sample_latents(network, p, ids.astype(np.int32), keep_k, noise, Sampler(**config.sampler), False)
  )
  np.testing.assert_allclose(path[:, -1], sample(params), atol=0.02)  # stored in float16, from noise in float16
  for first in (0, 14, 30):  # of the files
    part = keep_k[first : first + 4]
    assert (part <= nested.row_bounds("pow2", REGISTERS, 0.0, ROWS)).all() and (np.diff(part) >= 0).all()
  assert set(keep_k) <= {1, 2, 4, 8, 16} and len(set(keep_k)) == 5


def test_killed_and_rerun_with_other_batches_the_shards_are_the_same(root):
  write(root, "again", "--shards=3")
  path = next((root / "again" / "train").glob("trajectories-00001*"))
  path.unlink()
  (root / "again" / "train" / "meta.json").unlink()
  write(root, "again", "--batch_size=16")
  one, two = (trajectories.TrajectoryShards(root / name) for name in ("shards", "again"))
  for i in range(len(one)):
    np.testing.assert_array_equal(one[i]["ids"], two[i]["ids"])
    assert one[i]["keep_k"] == two[i]["keep_k"]
    np.testing.assert_allclose(one[i]["path"].astype(np.float32), two[i]["path"].astype(np.float32), atol=4e-3)


@pytest.mark.parametrize("rows", [ROWS, 2, 1])
def test_groups_of_a_batch_are_stratified_and_every_epoch_has_all_records(root, rows):
  """Also smaller groups than those that were written."""
  shards = trajectories.TrajectoryShards(root / "shards")
  strata = shards.strata(rows)
  assert sorted(np.concatenate(strata)) == list(range(len(shards))) and len(strata) == rows
  bounds = nested.row_bounds("pow2", REGISTERS, 0.0, rows)

  def batches(start, count, **options):
    loading = pipeline.Loading(num_threads=2, num_workers=0, prefetch=1)
    found = trajectories.train_batches(shards, loading, seed=3, rows=rows, global_batch=8, start_step=start, **options)
    with pipeline.closing(found, loading):
      return [next(found) for _ in range(count)]

  whole = batches(0, 12)
  seen = [b["path"][i, 0, 0, 0, 0] for b in whole for i in range(8) if i % rows == 0]
  first = {shards[i]["path"][0, 0, 0, 0] for i in strata[0]}
  assert set(seen[: len(strata[0])]) == first
  for batch in whole:
    assert (batch["keep_k"].reshape(-1, rows) <= bounds).all()
    assert batch["path"].shape == (8, 5, SIZE, SIZE, 3) and batch["path"].dtype == np.float16
  (later,) = batches(7, 1)
  halves = [batches(7, 1, process_index=i, process_count=2)[0] for i in range(2)]
  for name, x in whole[7].items():
    np.testing.assert_array_equal(later[name], x)
    np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), x)


def test_the_loss_on_shards_is_that_of_paths_computed_in_the_step(root):
  stage = make_stage(distill_config(root))
  params = make_params(stage)
  params["teacher"] = jax.tree.map(
    lambda x: x + 0.05, {k: v for k, v in params["decoder"].items() if k != "interval_embed"}
  )
  latents = np.random.default_rng(2).normal(size=(8, SIZE, SIZE, 3)).astype(np.float32)
  key = jax.random.key(1)
  draw_key, loss_key = jax.random.split(key)

  @jax.jit
  def both(params):
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stage._draw(jnp.asarray(latents), draw_key))
    paths = stage.paths(params, rows.latents, rows.noise, rows.keep_k)
    ids = fsq.codes_to_ids(paths.codes, stage.model.levels)
    batch = {"token_ids": ids, "keep_k": rows.keep_k, "path": paths.path}
    return stage.loss_fn(params, batch, loss_key, jnp.int32(0)), stage.latents_loss(params, latents, key)

  (loss, metrics), (expected, others) = both(params)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert metrics.keys() == others.keys()
  for name in metrics:
    np.testing.assert_allclose(metrics[name], others[name], rtol=1e-4, atol=1e-5)


def test_a_run_on_shards_resumes_and_writes_a_student(root, tmp_path):
  """Killed after step 2 and resumed, it ends with the same weights, and its tokens are those of its teacher."""
  settings = dict(num_steps=4, log_every=1, checkpoint_every=2, eval_every=100)
  config = with_fields(distill_config(root, trajectories=str(root / "shards")), {"fast": False})  # compiles one bucket
  config.train.update(settings)
  run_training(config, str(tmp_path / "run"))
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines if "loss_n4" in x] == [1, 2, 3, 4]
  weights = load_file(tmp_path / "run" / "weights.safetensors")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  (tmp_path / "run" / "weights.safetensors").unlink()
  run_training(config, str(tmp_path / "run"))
  again = load_file(tmp_path / "run" / "weights.safetensors")
  assert weights.keys() == again.keys()
  for name, x in weights.items():
    np.testing.assert_array_equal(again[name], x)
  own, of_teacher = (
    fingerprints.tokenizer(*loading.load(str(path))) for path in (tmp_path / "run", root / "teacher.safetensors")
  )
  assert own == of_teacher  # token ids are the same
  assert any("interval_embed" in name for name in weights) and not any(name.startswith("teacher") for name in weights)
  own = json.loads((tmp_path / "run" / "config.json").read_text())
  assert own["distill"]["sampler"]["guidance"] == "cfg" and len(own["distill"]["teacher"]) == 16


def test_bad_input(root, tmp_path):
  def train_with(words, config, **fields):
    with pytest.raises(ValueError, match=words):
      run_training(with_fields(config, fields), str(tmp_path / "bad"))

  config = distill_config(root, trajectories=str(root / "shards"))
  other = {"init_from": str(root / "other.safetensors")}
  train_with(
    "trajectory shards are of decoder .{16}, but the teacher is .{16}: write shards with this teacher", config, **other
  )
  train_with(
    "4 intervals per path, which distill.steps does not divide .*multiple 8", config, **{"distill.steps": (1, 8)}
  )
  train_with(
    "groups of 4 rows, which those of a batch of 8 .8 rows. do not divide", config, **{"tokens.bucket_rows": 8}
  )
  train_with("stage 'distill' needs a teacher: set init_from", config, init_from="")
  student = FlexTok(make_params(make_stage(config)), FrozenConfigDict(config))
  saving.save_weights(str(tmp_path / "student.safetensors"), config, student.params)
  what = "--what=trajectories", f"--config={data_file(root)}", f"--out={tmp_path / 'x'}"
  fails(
    "a model of stage .distill. is not a teacher: give a tokenizer",
    tokenize,
    *what,
    f"--checkpoint={tmp_path / 'student.safetensors'}",
  )
  fails(
    "--steps has no meaning for --what=latents", tokenize, "--what=latents", *what[1:], "--checkpoint=x", "--steps=1"
  )
  fails("--checkpoint is missing", tokenize, *what)
