"""The update, its metrics, and whole runs of the train loop on tiny configurations."""

import json
import os
from pathlib import Path
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import orbax.checkpoint as ocp
from PIL import Image
import pytest
import skimage.data

from configs import debug
from flextok_jax import train
from flextok_jax.data import pipeline
from flextok_jax.ops import nested
from flextok_jax.stages import make_stage
from flextok_jax.training import checkpoint, optim, sharding
from flextok_jax.training import metrics as metrics_lib
from flextok_jax.training.state import ema_decay, init_state, make_update, unbox

ROOT = Path(__file__).parents[1]
VAE = dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(8,), layers_per_block=1, norm_groups=4,
           scaling_factor=0.5)  # fmt: skip


def config_of(**overrides):
  c = debug.get_config()
  c.update(overrides)
  return c


def read_metrics(workdir):
  """(training lines, evaluation lines) of a workdir."""
  lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  return [x for x in lines if "loss" in x], [x for x in lines if "loss" not in x]


def read_checkpoint(workdir, step, name):
  return ocp.StandardCheckpointer().restore(Path(workdir).absolute() / "checkpoints" / str(step) / name)


def checkpoint_steps(workdir):
  return sorted(int(path.name) for path in (Path(workdir) / "checkpoints").iterdir())


def files_of(folder):
  """Path -> content of all files below."""
  return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# The update.


class LinearStage:
  """A stage double: mean squared error of a linear map of the image, and a draw of the key."""

  def init(self, key):
    weights = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("in", "out"))(key, (12, 3))
    return {"linear": {"kernel": weights}}, {"vae": {"kernel": jnp.ones(2)}}

  def loss_fn(self, params, batch, key):
    x = batch["image"].astype(jnp.float32).reshape(-1, 12) / 255
    per_sample = jnp.square(x @ params["linear"]["kernel"] - params["vae"]["kernel"].sum()).mean(-1)
    low = per_sample < 2
    return per_sample.mean(), {
        "loss": (per_sample.sum(), per_sample.size),
        "low": (jnp.where(low, per_sample, 0).sum(), low.sum()),
        "draw": (jax.random.uniform(key), 1),
    }


def linear_batch(rows=8):
  rng = np.random.default_rng(0)
  return {"image": rng.integers(0, 256, (rows, 2, 2, 3), np.uint8), "unreadable": np.ones(rows, np.int32)}


def linear_run(steps=1, accumulate_steps=1, optimizer=None, decay=0.5, stage=None):
  """Returns the states and metrics after each step."""
  stage, optimizer = stage or LinearStage(), optimizer or optax.sgd(0.1)
  state = unbox(init_state(stage, optimizer, jax.random.key(0)))
  update = jax.jit(make_update(stage, optimizer, accumulate_steps=accumulate_steps, decay=decay))
  states, metrics = [state], []
  for _ in range(steps):
    state, step_metrics = update(state, linear_batch(), jax.random.key(1))
    states.append(state)
    metrics.append(metrics_lib.compute(step_metrics))
  return states, metrics


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
  (_, whole), (expected,) = linear_run()
  (_, state), (metrics,) = linear_run(accumulate_steps=parts)
  np.testing.assert_allclose(state.params["linear"]["kernel"], whole.params["linear"]["kernel"], rtol=1e-6)
  for name in ("loss", "low", "grad_norm", "unreadable"):
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
  assert expected["unreadable"] == 8 and expected["low"] < expected["loss"]
  assert metrics["draw"] != expected["draw"]  # the mean of other draws, a key for every part


def test_every_step_has_its_own_key_and_one_alone():
  _, metrics = linear_run(3)
  assert len({m["draw"] for m in metrics}) == 3
  assert linear_run(3)[1] == metrics


def test_average_warms_up():
  states, _ = linear_run(12, decay=0.5)
  average = np.asarray(states[0].params["linear"]["kernel"])
  for step, state in enumerate(states[1:]):
    decay = min(0.5, (1 + step) / (10 + step))
    assert np.isclose(ema_decay(0.5, step), decay)
    average = decay * average + (1 - decay) * state.params["linear"]["kernel"]
    np.testing.assert_allclose(state.ema["linear"]["kernel"], average, rtol=1e-5)
  assert decay == 0.5


def test_frozen_parts_are_not_trained():
  optimizer = optim.make_optimizer(config_of().optim, 10)
  states, _ = linear_run(3, optimizer=optimizer)
  np.testing.assert_array_equal(states[-1].frozen["vae"]["kernel"], np.ones(2))
  assert int(states[-1].step) == 3
  shapes = {x.shape for x in jax.tree.leaves(states[-1].opt_state)}
  assert shapes == {(), (12, 3)}
  assert set(states[-1].joined()) == set(states[-1].joined(average=True)) == {"linear", "vae"}
  assert_trees_equal(states[-1].joined(average=True)["linear"], states[-1].ema["linear"])


def test_a_gradient_that_is_not_finite_is_noticed():
  class Kink(LinearStage):  # a finite loss with an infinite slope

    def loss_fn(self, params, batch, key):
      loss, metrics = super().loss_fn(params, batch, key)
      return loss + jnp.sqrt(jnp.square(params["linear"]["kernel"] * 0).sum()), metrics

  _, (metrics,) = linear_run()
  assert metrics["first_bad_step"] == metrics_lib.NEVER
  _, (metrics,) = linear_run(stage=Kink())
  assert np.isfinite(metrics["loss"]) and metrics["first_bad_step"] == 1


def test_metrics_merge_as_weighted_means():
  make = lambda total, count, finite, step: metrics_lib.from_update(
      {"a": (total, count), "empty": (0.0, 0)}, jnp.int32(2), jnp.bool_(finite), jnp.int32(step)
  )
  merged = metrics_lib.merge(metrics_lib.merge(make(6.0, 3, True, 7), make(1.0, 1, False, 8)), make(3.0, 0, False, 9))
  assert metrics_lib.compute(merged) == {"a": 2.5, "unreadable": 6, "first_bad_step": 8}


# The optimiser.


def test_only_kernels_are_decayed():
  """A step with gradients of zero moves what is decayed, by learning rate * decay, and nothing else."""
  stage = make_stage(config_of())
  params = jax.tree.map(lambda x: jnp.ones(x.shape), unbox(jax.eval_shape(stage.init, jax.random.key(0))[0]))
  settings = config_of(optim=dict(learning_rate=0.5, warmup_steps=0, weight_decay=0.2)).optim
  optimizer = optim.make_optimizer(settings, 100)
  step = lambda params: optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]
  updates = jax.jit(step)(params)
  names = set()
  for path, x in jax.tree_util.tree_leaves_with_path(updates):
    expected = -0.5 * 0.2 if path[-1].key == "kernel" else 0
    np.testing.assert_allclose(x, np.full(x.shape, expected), rtol=1e-6, err_msg=jax.tree_util.keystr(path))
    names.add(path[-1].key)
  assert names >= {"kernel", "bias", "registers", "mask_token", "null_token", "register_positions"}


def test_gradients_are_clipped_by_their_global_norm():
  settings = config_of(optim=dict(clip_norm=0.5, b1=0.0, weight_decay=0.0)).optim
  optimizer, params = optim.make_optimizer(settings, 10), {"kernel": jnp.zeros(4), "bias": jnp.zeros(3)}
  grads = {"kernel": jnp.full(4, 30.0), "bias": jnp.full(3, -40.0)}
  _, state = optimizer.update(grads, optimizer.init(params), params)
  (moments,) = (s.mu for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
  np.testing.assert_allclose(optax.global_norm(moments), 0.5, rtol=1e-5)  # with b1 = 0 the clipped gradient itself
  np.testing.assert_allclose(moments["kernel"][0] / moments["bias"][0], -0.75, rtol=1e-5)


def test_schedule():
  settings = config_of(optim=dict(learning_rate=1.0, warmup_steps=10, end_learning_rate=0.1)).optim
  schedule = optim.make_schedule(settings, 110)
  values = np.array([schedule(i) for i in (0, 5, 10, 60, 110, 200)])
  np.testing.assert_allclose(values, [0, 0.5, 1, 0.55, 0.1, 0.1], atol=1e-6)
  for num_steps in (1, 5, 10, 11):  # shorter than the warm-up, too
    assert np.isfinite([optim.make_schedule(settings, num_steps)(i) for i in range(13)]).all()


# The tokenizer's loss.


@pytest.mark.parametrize("mode, registers", [("pow2", 4), ("uniform", 6), ("uniform_pow2", 6)])
def test_buckets_share_out_the_loss(mode, registers):
  tokens = dict(num_registers=registers, nested_dropout=mode, null_prob=0.3, saturation_weight=0.5)
  stage = make_stage(config_of(tokens=tokens))
  params = unbox(jax.eval_shape(stage.init, jax.random.key(0))[0])
  params = jax.tree.map(lambda x: np.random.default_rng(0).normal(0, 0.2, x.shape).astype(np.float32), params)
  batch = {"image": np.random.default_rng(1).integers(0, 256, (64, 16, 16, 3), np.uint8)}
  loss, metrics = jax.jit(stage.loss_fn)(params, batch, jax.random.key(0))
  (total, count), (saturation, _) = metrics.pop("loss"), metrics.pop("saturation")
  assert set(metrics) == {"loss_null"} | {f"loss_k{k}" for k in nested.lengths(registers)}
  assert count == 64 and sum(n for _, n in metrics.values()) == 64
  assert all(n > 0 for _, n in metrics.values()) and 8 < metrics["loss_null"][1] < 32
  np.testing.assert_allclose(sum(x for x, _ in metrics.values()), total, rtol=1e-5)
  assert saturation > 0  # a penalty beside the loss that is reported
  np.testing.assert_allclose(loss, (total + 0.5 * saturation) / 64, rtol=1e-6)


def test_loss_falls_on_a_few_pictures():
  """Sixteen pictures are learned: at first the loss is the spread of noise - x0, about 1 + var(x0)."""
  config = config_of(optim=dict(learning_rate=5e-3, warmup_steps=20), flow=dict(t_sampling="uniform"))
  stage, optimizer = make_stage(config), optim.make_optimizer(config.optim, 300)
  state = jax.jit(lambda key: unbox(init_state(stage, optimizer, key)))(jax.random.key(0))
  update = jax.jit(make_update(stage, optimizer, accumulate_steps=1, decay=0.9), donate_argnums=0)
  images = pipeline.eval_set(config.data, "synthetic", image_size=16, num_images=16)["image"]
  losses = []
  for _ in range(300):
    state, metrics = update(state, {"image": images, "unreadable": np.zeros(16, np.int32)}, jax.random.key(1))
    losses.append(metrics["loss"])
  losses = [float(x.compute()) for x in losses]
  assert np.mean(losses[-50:]) < 0.6 * np.mean(losses[:5]), (losses[:5], losses[-50:])


# Devices.


def mesh_of(devices):
  return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def test_eight_devices_compute_what_one_computes():
  """Plain gradient descent: Adam would blow rounding errors up where gradients are tiny."""
  config = config_of()
  stage, optimizer = make_stage(config), optax.sgd(0.1)
  batches = [next(pipeline.train_batches(config.data, image_size=16, seed=0, start_step=i)) for i in range(3)]
  boxed = jax.eval_shape(lambda key: init_state(stage, optimizer, key), jax.random.key(0))
  rng = np.random.default_rng(0)
  start = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), unbox(boxed))
  start = start.replace(step=np.int32(0), opt_state=optimizer.init(start.params))

  def run_on(devices):
    mesh = mesh_of(devices)
    shardings = sharding.tree_shardings(boxed, mesh)
    update = make_update(stage, optimizer, accumulate_steps=1, decay=0.9)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    state, losses = jax.device_put(start, shardings), []
    for batch in sharding.device_batches(iter(batches), sharding.batch_sharding(mesh)):
      assert {s.data.shape[0] for s in batch["image"].addressable_shards} == {8 // len(devices)}
      state, metrics = update(state, batch, jax.random.key(1))
      losses.append(metrics_lib.compute(metrics)["loss"])
    assert state.params["encoder"]["head"]["kernel"].sharding.device_set == set(devices)
    return losses, jax.device_get(state.params)

  (losses, params), (expected_losses, expected) = run_on(jax.devices()), run_on(jax.devices()[:1])
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  for a, b, c in zip(*map(jax.tree.leaves, (params, expected, start.params)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert (b != c).any()


def test_batches_reach_the_devices_whole_and_in_order():
  """The global arrays are the rows of one process, or of two together, whatever is prefetched."""
  data = config_of().data
  whole = pipeline.train_batches(data, image_size=16, seed=0)
  halves = [pipeline.train_batches(data, image_size=16, seed=0, process_index=i, process_count=2) for i in (0, 1)]
  placed = sharding.device_batches(whole, sharding.batch_sharding(mesh_of(jax.devices())))
  for _ in range(3):
    batch, parts = next(placed), [next(half) for half in halves]
    for name, array in batch.items():
      np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
      assert len(array.sharding.device_set) == 8
  numbers = ({"x": np.full(8, i)} for i in range(5))
  placed = sharding.device_batches(numbers, sharding.batch_sharding(mesh_of(jax.devices())), ahead=3)
  assert [int(batch["x"][0]) for batch in placed] == [0, 1, 2, 3, 4]


# Whole runs.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of 20 steps with two evaluations and TensorBoard files."""
  workdir = tmp_path_factory.mktemp("run") / "a" / "workdir"
  config = config_of(train=dict(num_steps=20, log_every=4, checkpoint_every=8, eval_every=10, keep_checkpoints=2,
                                keep_period=0, tensorboard=True))  # fmt: skip
  train.train(config, str(workdir))
  return types.SimpleNamespace(workdir=workdir, config=config)


def test_metrics_of_a_run(run):
  lines, evals = read_metrics(run.workdir)
  assert {4, 8, 12, 16, 20} <= {x["step"] for x in lines}
  schedule = optim.make_schedule(run.config.optim, 20)
  for x in lines:
    assert all(np.isfinite(v) for v in x.values())
    assert x["loss"] > 0 and x["grad_norm"] > 0 and x["unreadable"] == 0 and x["images_per_second"] > 0
    assert {"loss_k1", "loss_k2", "loss_k4"} & set(x) and set(x) - {"step"} <= {
        "loss", "loss_k1", "loss_k2", "loss_k4", "loss_null", "saturation", "grad_norm", "unreadable", "learning_rate",
        "images_per_second", "eta_seconds"}  # fmt: skip
    np.testing.assert_allclose(x["learning_rate"], schedule(x["step"] - 1), rtol=1e-6)
    np.testing.assert_allclose(x["eta_seconds"], (20 - x["step"]) * 8 / x["images_per_second"], rtol=1e-6)
  assert [x["step"] for x in evals] == [10, 20]
  for x in evals:
    assert {f"eval/synthetic/{m}_{k}" for m in ("psnr", "ssim", "mae") for k in (1, 2, 4)} == set(x) - {"step"}


def test_files_of_a_run(run):
  assert checkpoint_steps(run.workdir) == [16, 20]
  assert set(read_checkpoint(run.workdir, 20, "params")) == {"encoder", "decoder"}
  for step in (10, 20):
    folder = run.workdir / "eval" / f"{step:08d}"
    assert {p.name for p in folder.iterdir()} == {"report.json", "curve.png", "grid_synthetic.png"}
    assert Image.open(folder / "grid_synthetic.png").width > 96
  assert checkpoint.read_config(str(run.workdir)).to_dict() == json.loads(run.config.to_json())
  config, weights = checkpoint.load_weights(str(run.workdir / "weights.safetensors"))
  assert config.stage == "tokenizer"
  average = read_checkpoint(run.workdir, 20, "ema")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), weights, average)
  assert list((run.workdir / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_holds_the_same_numbers(run):
  from tensorboard.backend.event_processing import event_accumulator

  events = event_accumulator.EventAccumulator(str(run.workdir / "tensorboard"), {"tensors": 0}).Reload()
  lines, evals = read_metrics(run.workdir)
  for name in ("loss", "learning_rate", "eval/synthetic/psnr_4"):
    written = {e.step: float(np.asarray(e.tensor_proto.float_val)[0]) if e.tensor_proto.float_val
               else float(np.frombuffer(e.tensor_proto.tensor_content, np.float32)[0])
               for e in events.Tensors(name)}  # fmt: skip
    expected = {x["step"]: x[name] for x in (evals if "/" in name else lines)}
    assert written == pytest.approx(expected, rel=1e-5)


def test_rerun_of_a_finished_run_has_nothing_to_do(run, capsys):
  before = files_of(run.workdir / "checkpoints"), (run.workdir / "metrics.jsonl").read_bytes()
  train.train(run.config, str(run.workdir))
  assert "nothing to do" in capsys.readouterr().out
  assert (files_of(run.workdir / "checkpoints"), (run.workdir / "metrics.jsonl").read_bytes()) == before


def test_weights_are_written_even_if_a_kill_came_between_them_and_the_last_checkpoint(run):
  path = run.workdir / "weights.safetensors"
  before = checkpoint.load_weights(str(path))[1]
  path.unlink()
  train.train(run.config, str(run.workdir))
  assert_trees_equal(checkpoint.load_weights(str(path))[1], before)


def test_autoencoder_then_tokenizer_over_it(tmp_path, capsys):
  """Stage "vae" learns; a tokenizer run takes its average, keeps it frozen and out of its optimiser."""
  data = dict(global_batch=16)
  quick = dict(num_steps=40, log_every=2, checkpoint_every=40, eval_every=40)
  vae_config = config_of(stage="vae", vae=VAE, data=data, train=quick, optim=dict(learning_rate=5e-3, warmup_steps=5))
  train.train(vae_config, str(tmp_path / "vae"))
  lines, evals = read_metrics(tmp_path / "vae")
  assert np.mean([x["loss"] for x in lines[-5:]]) < 0.65 * lines[0]["loss"]
  assert {"loss", "l1", "l2", "kl"} <= set(lines[0]) and evals[-1]["eval/synthetic/psnr_vae"] > 8
  x = lines[-1]
  np.testing.assert_allclose(x["loss"], x["l1"] + vae_config.vae_loss.kl_weight * x["kl"], rtol=1e-4)

  config = config_of(vae=VAE, init_from=str(tmp_path / "vae"),
                     train=dict(num_steps=3, log_every=1, checkpoint_every=3, eval_every=3))  # fmt: skip
  train.train(config, str(tmp_path / "tokenizer"))
  trained, average = read_checkpoint(tmp_path / "vae", 40, "params"), read_checkpoint(tmp_path / "vae", 40, "ema")
  frozen = read_checkpoint(tmp_path / "tokenizer", 3, "frozen")
  assert set(frozen) == {"vae"}
  assert_trees_equal(frozen, average)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(average)))
  params, opt_state = (read_checkpoint(tmp_path / "tokenizer", 3, name) for name in ("params", "opt_state"))
  assert set(params) == {"encoder", "decoder"}
  assert "vae" not in str(jax.tree_util.tree_structure(opt_state))
  _, weights = checkpoint.load_weights(str(tmp_path / "tokenizer"))
  assert_trees_equal(weights["vae"], average["vae"])
  # Without trained weights a frozen autoencoder would be noise.
  with pytest.raises(ValueError, match="vae needs trained weights: give --config.init_from"):
    train.train(config_of(vae=VAE), str(tmp_path / "random"))
  with pytest.raises(ValueError, match="encoder, decoder; needed: vae|needed: vae"):
    pixels = tmp_path / "pixels.safetensors"
    checkpoint.save_weights(str(pixels), config_of(), unbox(make_stage(config_of()).init(jax.random.key(0))[0]))
    train.train(config_of(vae=VAE, init_from=str(pixels)), str(tmp_path / "random"))


# What stops a run.


def poisoned_batches(monkeypatch, bad_step):
  """From here on, images are no numbers at one step."""

  def batches(*args, start_step=0, **kwargs):
    for i, batch in enumerate(pipeline.train_batches(*args, start_step=start_step, **kwargs), start_step + 1):
      images = batch["image"].astype(np.float32) / 127.5 - 1
      yield {**batch, "image": images * (np.nan if i == bad_step else 1)}

  monkeypatch.setattr(train, "pipeline", types.SimpleNamespace(train_batches=batches, eval_set=pipeline.eval_set))


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
  config = config_of(train=dict(num_steps=20, log_every=5, checkpoint_every=10, eval_every=20))
  poisoned_batches(monkeypatch, 3)
  with pytest.raises(ValueError, match="not finite at step 3; there is no checkpoint yet.*optim.learning_rate"):
    train.train(config, str(tmp_path / "early"))
  assert not checkpoint_steps(tmp_path / "early")

  workdir = tmp_path / "run"
  monkeypatch.undo()
  poisoned_batches(monkeypatch, 13)
  with pytest.raises(ValueError, match="not finite at step 13; the checkpoint of step 10 is untouched") as error:
    train.train(config, str(workdir))
  assert "\n" not in str(error.value)
  assert checkpoint_steps(workdir) == [10] and not (workdir / "weights.safetensors").exists()
  lines, _ = read_metrics(workdir)
  assert [x["step"] for x in lines] == [5, 10] and "NaN" not in (workdir / "metrics.jsonl").read_text()
  for name in ("params", "ema", "opt_state"):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(read_checkpoint(workdir, 10, name)))
  good = files_of(workdir / "checkpoints" / "10")
  with pytest.raises(ValueError, match="not finite at step 13; the checkpoint of step 10 is untouched"):
    train.train(config, str(workdir))
  assert files_of(workdir / "checkpoints" / "10") == good
  monkeypatch.undo()  # the cause is mended: the run goes on
  train.train(config, str(workdir))
  assert checkpoint_steps(workdir) == [10, 20]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """60 jpg files in two classes, every sixth truncated, and two whole ones to evaluate on."""
  folder, photo = tmp_path_factory.mktemp("pictures"), skimage.data.astronaut()
  for i in range(62):
    path = folder / ("val" if i >= 60 else "train") / ("even", "odd")[i % 2] / f"{i}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo[i * 5 : i * 5 + 64, 100:190]).save(path)
    if i % 6 == 0 and i < 60:
      path.write_bytes(path.read_bytes()[:300])
  return folder


def folder_config(pictures, max_unreadable, **settings):
  sources = dict(synthetic=dict(weight=0.0),
                 folder=dict(weight=1.0, path=str(pictures / "train"), val_path=str(pictures / "val")))  # fmt: skip
  return config_of(data=dict(sources=sources, max_unreadable=max_unreadable), eval=dict(sources=("folder",)),
                   train=dict(num_steps=20, **settings))  # fmt: skip


def test_a_few_unreadable_files_are_passed_over_and_counted(pictures, tmp_path):
  train.train(folder_config(pictures, 0.5, log_every=4), str(tmp_path))
  lines, _ = read_metrics(tmp_path)
  assert 20 <= sum(x["unreadable"] for x in lines) <= 40  # one in six of the files, 160 images


def test_the_share_of_unreadable_files_is_that_of_all_images_since_the_last_count(pictures, tmp_path):
  """An evaluation in between does not make the count one of fewer images."""
  train.train(folder_config(pictures, 0.5, log_every=20, eval_every=19, checkpoint_every=20), str(tmp_path))


def test_too_many_unreadable_files_stop_the_run(pictures, tmp_path):
  config = folder_config(pictures, 0.05, log_every=4)
  with pytest.raises(ValueError, match=r"\d unreadable files among the last 32 images.*max_unreadable=0.05") as error:
    train.train(config, str(tmp_path))
  assert "\n" not in str(error.value)


def test_training_runs_without_tensorflow(tmp_path):
  """As a user's process in which tensorflow cannot be imported: console and JSON lines, said once."""
  code = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.split(".")[0] == "tensorflow" else find(name, *args)
from flextok_jax import cli, train
cli.run(train.main)
"""
  args = ["--config=configs/debug.py", f"--workdir={tmp_path}", "--config.train.num_steps=2",
          "--config.train.log_every=1", "--config.train.tensorboard=True"]  # fmt: skip
  env = {**os.environ, "XLA_FLAGS": ""}
  done = subprocess.run(
      [sys.executable, "-c", code, *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("loss") == 2 and (done.stdout + done.stderr).count("TensorBoard") == 1
  lines, evals = read_metrics(tmp_path)
  assert [x["step"] for x in lines] == [1, 2] and len(evals) == 1
  assert not (tmp_path / "tensorboard").exists()
