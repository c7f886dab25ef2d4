"""REPA: its loss against numpy, features of a block, the reach of its gradient, runs with it, errors."""

import functools
import json
import shutil

from flax.core.meta import unbox
import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from flextok_jax import config as common
from flextok_jax import train
from flextok_jax.core.flops import count
from flextok_jax.evals import from_config
from flextok_jax.models.tokenizer.decoder import Inputs
from flextok_jax.models.tokenizer.repa import Projector
from flextok_jax.models.transformer import ModulatedBlock
from flextok_jax.ops import repa as ops
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage, repa
from flextok_jax.tools.benchmark import repa as benchmark_repa
from flextok_jax.tools.compile import jobs as compile_jobs
from flextok_jax.training import inputs, loop, mup, optim, teacher
from flextok_jax.training.state import init_state, make_update
from flextok_jax.weights import fingerprints, loading
from tests.support import analytic_flops as flops
from tests.support import vit_reference
from tests.support.configs import parse

WIDTH, FEATURES, GRID = 32, 32, 4
REPA = dict(weight=0.5, block=1, hidden=24, features=FEATURES, dtype="float32")


def config_of(repa_fields=(), **overrides):
  """16 px in pixel space, 4 x 4 patches of the decoder, three blocks in it, four registers."""
  part = dict(width=WIDTH, head_dim=16, patch_size=4)
  settings = dict(
    image_size=16,
    dtype="float32",
    vae=dict(kind="pixels", scaling_factor=1.0),
    encoder=part | dict(depth=1),
    decoder=part | dict(depth=3),
    repa=REPA | dict(repa_fields),
    tokens=dict(num_registers=4, levels=(8, 5, 5), null_prob=0.25, saturation_weight=0.3),
    optim=dict(learning_rate=1e-3, warmup_steps=2, ema_decay=0.9),
    sampler=dict(num_steps=1, guidance="none"),
    data=dict(
      global_batch=8,
      num_threads=1,
      prefetch=1,
      sources=dict(tfds=dict(weight=0.0), synthetic=dict(weight=1.0, render_size=16)),
    ),
    train=dict(
      num_steps=4,
      log_every=1,
      checkpoint_every=2,
      keep_period=0,
      eval_every=100,
      tensorboard=False,
      export_dtype="float32",
    ),
    eval=dict(sources=("synthetic",), num_images=2, batch_size=2, grid_images=1, num_tokens=(4,)),
  )
  return common.derive(**settings | overrides)


def random_params(stage, scale=0.2):
  """Of all trained parts, normals: what starts at zero has gradients, too."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda key: {**stage.init(key)[0], **stage.init_auxiliary(key)[0]}, jax.random.key(0))
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32), unbox(shapes))


def inputs_of(size=16, grid=GRID):
  rng = np.random.default_rng(1)
  latents = rng.normal(size=(size, 16, 16, 3)).astype(np.float32)
  return latents, rng.normal(size=(size, grid**2, FEATURES)).astype(np.float32)


# The loss and its parts.


def numpy_loss(params, features, wanted):
  """-cos of the three-layer projection of features [n, d] and wanted [n, f], mean over n, in float64."""
  x = np.float64(features)
  for name in ("in", "middle", "out"):
    x = x @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])
    x = x / (1 + np.exp(-x)) if name != "out" else x
  return -((x * wanted).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(np.float64(wanted), axis=-1)).mean()


def test_projector_and_cosine():
  rng = np.random.default_rng(0)
  x, wanted = rng.normal(size=(2, 5, 8)), rng.normal(size=(2, 5, 6))
  projector = Projector(7, 6)
  params = unbox(jax.eval_shape(projector.init, jax.random.key(0), x)["params"])
  params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), params)
  same = np.float32(wanted)

  @jax.jit
  def compute(params, x):
    found = ops.alignment_loss(projector.apply({"params": params}, x), same)
    of_same = ops.alignment_loss(3 * same, same)
    in_bfloat16 = ops.alignment_loss(jnp.ones((1, 2, 3), jnp.bfloat16), jnp.ones((1, 2, 3)))
    return found, of_same, in_bfloat16, jax.grad(lambda x: ops.alignment_loss(x, same).sum())(jnp.zeros_like(same))

  found, of_same, in_bfloat16, at_zero = compute(params, np.float32(x))
  np.testing.assert_allclose(found, [numpy_loss(params, a, b) for a, b in zip(x, wanted)], rtol=1e-5)
  assert found.dtype == in_bfloat16.dtype == jnp.float32
  np.testing.assert_allclose(of_same, -1, rtol=1e-6)
  assert np.isfinite(at_zero).all()


def test_features_of_another_grid_are_resized_bilinearly():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 4, 3)).astype(np.float32)
  np.testing.assert_array_equal(ops.resize_features(x, 2, 2), x)
  square = x.reshape(2, 2, 2, 3)
  weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])  # centres of four pixels among those of two
  want = np.einsum("ai,bj,nijd->nabd", weights, weights, square).reshape(2, 16, 3)
  np.testing.assert_allclose(ops.resize_features(x, 4, 4), want, atol=1e-6)
  with pytest.raises(ValueError, match="5 features do not form a square grid"):
    ops.resize_features(x[:, [0, 1, 2, 3, 0]], 4, 4)


def test_features_are_the_hidden_states_after_each_block():
  """Compared with calling the blocks one after another, without the scan."""
  stage = make_stage(config_of())
  params, rng = random_params(stage)["decoder"], np.random.default_rng(2)
  decoder = stage.model.decoder
  x, codes = rng.normal(size=(2, 16, 16, 3)), rng.uniform(-1, 1, (2, 4, 3))
  args = [np.float32(a) for a in (x, [0.2, 0.7], codes)] + [np.array([3, 4]), np.array([False, True])]

  @jax.jit
  def block_by_block(params):
    seen = {}

    def watch(next_fn, args, kwargs, context):
      result = next_fn(*args, **kwargs)
      if context.method_name == "run_blocks":
        (seen["stream"],) = args[0]
      return result

    with nn.intercept_methods(watch):
      ((plain, _),) = decoder.apply({"params": params}, [Inputs(*args)])
    segments, modulation, *_ = seen["stream"]
    found = []
    for i in range(3):
      tree = params["transformer"]
      tree = tree["last"] if i == 2 else jax.tree.map(lambda x, i=i: x[i], tree["blocks"])
      segments = ModulatedBlock(decoder.choices).apply({"params": tree}, segments, modulation[i], None, None)
      found.append(segments[0])
    return plain, found

  plain, found = block_by_block(params)
  run = lambda params, i: decoder.apply({"params": params}, [Inputs(*args)], feature_block=i)[0]
  tapped = jax.jit(lambda params: [run(params, i) for i in (1, 2, 3)])
  for (velocity, features), want in zip(tapped(params), found, strict=True):
    np.testing.assert_allclose(features, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(velocity, plain, rtol=1e-4, atol=1e-4)
  for number in (0, 4):
    with pytest.raises(ValueError, match=f"there is no block {number}: they are 1 to 3"):
      jax.eval_shape(lambda number=number: run(params, number))


def test_each_row_is_aligned_with_its_own_features(monkeypatch):
  """The stage shuffles rows and splits them into buckets; each is aligned with the features of its image.

  These have the grid of the decoder, or one half as wide.
  """
  stage = make_stage(config_of())
  params, (latents, wanted), (_, fewer) = random_params(stage), inputs_of(), inputs_of(grid=2)
  losses = stage._losses

  @jax.jit
  def loss_and_rows(params):
    outputs, buckets = [], []

    def watch(params, batches):
      outputs[:] = losses(params, batches)
      buckets[:] = [(rows.latents, *output) for (_, rows), output in zip(batches, outputs)]
      return outputs

    loss = functools.partial(stage.latents_loss, params, latents, jax.random.key(0))
    monkeypatch.setattr(stage, "_losses", watch)
    first = loss(wanted)
    monkeypatch.setattr(stage, "_losses", lambda *_: outputs)  # the same again
    return first, loss(fewer), buckets

  *found, buckets = jax.device_get(loss_and_rows(params))
  rows = [row for bucket in buckets for row in zip(*bucket)]
  assert len(rows) == 16 and len({tuple(np.ravel(row[0])[:4].tolist()) for row in rows}) == 16
  for (loss, metrics), given in zip(found, (wanted, fewer), strict=True):
    given = np.asarray(ops.resize_features(given, GRID, GRID))
    total, alignment = 0.0, 0.0
    for image, flow_loss, saturation, features in rows:
      (index,) = np.flatnonzero((latents == image).all((1, 2, 3)))
      own = numpy_loss(params["repa"], features, given[index])
      alignment, total = alignment + own, total + float(flow_loss) + 0.3 * float(saturation) + 0.5 * own
    np.testing.assert_allclose(metrics["repa"][0], alignment, rtol=1e-4)
    assert metrics["repa"][1] == 16
    np.testing.assert_allclose(loss, total / 16, rtol=1e-5)


def test_the_fast_path_and_the_plain_one_with_remat_agree():
  """Loss and all gradients, with the features of the second block."""
  latents, wanted = inputs_of()
  results = []
  for how in (dict(), dict(fast=False, remat="full")):
    stage = make_stage(config_of(dict(block=2), **how))
    params = random_params(stage)
    run = jax.jit(
      jax.value_and_grad(lambda p, stage=stage: stage.latents_loss(p, latents, jax.random.key(3), wanted), has_aux=True)
    )
    results.append(jax.device_get(run(params)))
  ((_, reference), want), ((_, metrics), grads) = results
  np.testing.assert_allclose(metrics["repa"][0], reference["repa"][0], rtol=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want)):
    assert np.abs(a - b).max() / np.abs(b).max() < 2e-5, jax.tree_util.keystr(path)


def test_parameters_that_the_alignment_gradient_reaches():
  """Gradients reach the encoder and blocks up to that of the features, and are exactly 0 after it."""
  stage = make_stage(config_of())
  latents, wanted = inputs_of()
  loss = lambda p: stage.latents_loss(p, latents, jax.random.key(3), wanted)[1]["repa"][0]
  grads = flatten_dict(jax.device_get(jax.jit(jax.grad(loss))(random_params(stage))), sep="/")
  for path, grad in grads.items():
    behind = path.startswith(("decoder/head", "decoder/transformer/last", "decoder/adaln/head"))
    if "transformer/blocks" in path and path.startswith("decoder") or path.startswith("decoder/adaln/") and not behind:
      assert np.any(grad[0]) and not np.any(grad[1:]), path  # stacked along the layers
    else:
      assert np.any(grad) != behind, path


# Off.


def test_zero_weight_disables_repa_completely():
  """Parameters, batch and program are unchanged, regardless of REPA's other settings."""
  new = config_of(dict(weight=0.0, block=99))
  stages = [make_stage(c) for c in (new, config_of(dict(weight=0.0)))]
  assert stages[0].init_auxiliary(jax.random.key(0)) == ({}, {})
  optimizer = optim.make_optimizer(new.optim, 4)
  texts = []
  for stage in stages:
    state = jax.eval_shape(lambda key, stage=stage: unbox(init_state(stage, optimizer, key)), jax.random.key(0))
    assert set(state.params) == {"encoder", "decoder"}
    batch = {"image": np.zeros((8, 16, 16, 3), np.uint8), "unreadable": np.zeros(8, np.int32)}
    update = make_update(stage, optimizer, accumulate_steps=1, decay=0.9)
    texts.append(str(jax.make_jaxpr(update)(state, batch, jax.random.key(0))))
  assert texts[0] == texts[1]
  batch = object()
  assert inputs.make_prepare(new, sharding.make_mesh(), train=True)(batch) is batch


def test_mup_and_muon():
  """muP scales only the first matrix of the projector; Muon leaves all of it to Adam."""
  stage = make_stage(config_of())
  groups = {}
  shapes = jax.eval_shape(lambda key: unbox(stage.init_auxiliary(key)[0]), jax.random.key(0))
  for path, x in jax.tree.leaves_with_path(shapes):
    names = mup.names_of(path)
    assert names[0] == "repa" and not optim.by_muon(names)
    if names[-1] == "kernel":
      groups[names[1]] = mup.group(names)
      assert names[1] != "in" or mup.width(names, x.shape) == WIDTH
  assert groups == {"in": "hidden", "middle": "input", "out": "input"}
  grads = {"repa": {"in": {"kernel": jnp.ones((WIDTH, 24))}, "out": {"kernel": jnp.ones((24, FEATURES))}}}
  same = mup.scale_gradients(8).update(grads, None)[0]
  jax.tree.map(np.testing.assert_array_equal, same, grads)


def test_flops_of_the_projector():
  latents, wanted = inputs_of()
  for on in (True, False):
    config = config_of(dict(weight=float(on)), fast=False)
    stage = make_stage(config)
    params = unbox(
      jax.eval_shape(stage.init, jax.random.key(0))[0] | jax.eval_shape(stage.init_auxiliary, jax.random.key(0))[0]
    )
    loss = lambda p, stage=stage: stage.latents_loss(p, latents, jax.random.key(3), wanted)[0]
    assert flops.train(config, 16, False) == pytest.approx(count(jax.grad(loss), params), rel=2e-5)
  assert flops.projector(config_of()) == 2 * 16 * (WIDTH * 24 + 24 * 24 + 24 * FEATURES)


@pytest.mark.parametrize("width, gflop", [(384, 12.2), (768, 46.3), (1024, 162.0)])
def test_flops_of_the_teacher(width, gflop):
  """At 16 x 16 patches, 1 + 256 tokens: 2 FLOPs a parameter of the blocks and token, and those of attention."""
  sizes = benchmark_repa.teacher_sizes(width)
  tokens, d = 257, width
  blocks = sizes["depth"] * (12 * d**2 * 2 * tokens + 4 * tokens**2 * d)
  assert flops.vit(sizes, 16) == blocks + 2 * 256 * 588 * d
  # and the table of positions, interpolated once
  assert benchmark_repa.teacher_flops(sizes, 16, 1) == pytest.approx(flops.vit(sizes, 16), rel=3e-3)
  assert flops.vit(sizes, 16) / 1e9 == pytest.approx(gflop, rel=0.01)


# On: many devices, runs, jobs.


def test_an_update_on_many_devices_equals_one_device():
  """Divided over data, fsdp and tensor, gradients accumulated over two parts; the one device has no buckets."""
  optimizer = optax.sgd(1.0)
  latents, wanted = inputs_of()
  images = (127.5 * (latents.clip(-1, 1) + 1)).astype(np.uint8)
  batch = {"image": images, "teacher": wanted, "unreadable": np.zeros(16, np.int32)}
  results = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "SMALL", 256)
    for axes in (dict(data=1), dict(data=2, fsdp=2, tensor=2)):
      stage = make_stage(config_of(fast=len(axes) > 1))
      count = np.prod(list(axes.values()))
      mesh = sharding.make_mesh(**axes, devices=jax.devices()[:count])
      boxed = jax.eval_shape(functools.partial(init_state, stage, optimizer), jax.random.key(0))
      places = sharding.tree_shardings(boxed, mesh)
      state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), unbox(boxed)).replace(params=random_params(stage))
      state = jax.device_put(jax.device_get(state), places)
      if count == 8:
        assert state.params["repa"]["in"]["kernel"].sharding.spec == P("fsdp", "tensor")
      update = jax.jit(make_update(stage, optimizer, accumulate_steps=2, decay=0.9), out_shardings=(places, None))
      state, metrics = update(state, jax.device_put(batch, sharding.batch_sharding(mesh)), jax.random.key(1))
      results.append((jax.device_get(state.params), float(metrics["repa"].compute()), float(metrics["loss"].compute())))
  (one, *numbers), (many, *others) = results
  np.testing.assert_allclose(others, numbers, rtol=1e-5)
  start = jax.device_get(random_params(stage))
  for (path, x), a, b in zip(jax.tree.leaves_with_path(start), *map(jax.tree.leaves, (one, many)), strict=True):
    assert np.any(a != x) and np.abs(a - b).max() < 1e-3 * np.abs(a - x).max() + 1e-7, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
  """A tiny DINOv2 of random weights: patches of 14 px, width 32."""
  return vit_reference.write("registers", tmp_path_factory.mktemp("dinov2"))


def test_the_teacher_sees_the_clean_image_at_the_grid_of_the_decoder(dinov2):
  config = config_of(dict(teacher=str(dinov2)))
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  sizes, params = teacher.read_teacher(config.repa.teacher, config.repa.features)
  assert "num_classes" not in sizes and "head" not in params
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
  batch = {"image": jax.device_put(images, sharding.batch_sharding(mesh)), "label": 1}
  found = inputs.make_prepare(config, mesh, train=True)(batch)
  assert set(found) == {"image", "label", "teacher"} and found["teacher"].shape == (8, GRID**2, FEATURES)
  assert found["teacher"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
  side = GRID * 14
  see = lambda params, x: teacher.ViT(**sizes).apply({"params": params}, teacher.preprocess(x, side, side))["patches"]
  want = np.asarray(jax.jit(see)(params, np.float32(images / 255)))
  np.testing.assert_allclose(found["teacher"], want, atol=1e-4)
  config.repa.update(dict(grid=3, dtype="bfloat16"))
  less = inputs.make_prepare(config, mesh, train=True)(batch)["teacher"]
  assert less.shape == (8, 9, FEATURES) and less.dtype == jnp.bfloat16
  config.repa.grid = 0
  rough = np.float32(inputs.make_prepare(config, mesh, train=True)(batch)["teacher"])
  assert np.abs(rough - want).mean() < 0.03 * np.std(want)
  assert fingerprints.teacher(sizes, params) == fingerprints.teacher(
    *teacher.read_teacher(config.repa.teacher, config.repa.features)
  )
  other = jax.tree.map(lambda x: 1.02 * x, params)
  assert fingerprints.teacher(sizes, other) != fingerprints.teacher(sizes, params)


@pytest.mark.usefixtures("shared_programs")
def test_a_run_resumes_and_leaves_a_model_without_projector(dinov2, tmp_path):
  config = config_of(dict(teacher=str(dinov2)), fast=False)
  train.train(config, str(tmp_path / "run"))
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4] and all(
    -1 <= x["repa"] <= 1 for x in lines if "loss" in x
  )
  weights = load_file(tmp_path / "run" / "weights.safetensors")
  assert {name.split("/")[0].split(".")[0] for name in weights} == {"encoder", "decoder"}
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  (tmp_path / "run" / "weights.safetensors").unlink()
  loop.train(config, str(tmp_path / "run"))
  again = load_file(tmp_path / "run" / "weights.safetensors")
  assert weights.keys() == again.keys()
  for name, x in weights.items():
    np.testing.assert_array_equal(again[name], x)
  shutil.rmtree(dinov2 := tmp_path / "none", ignore_errors=True)
  loaded, params = loading.load(str(tmp_path / "run"))
  assert loaded.repa.weight == 0.5 and set(params) == {"encoder", "decoder"}
  loaded.repa.teacher = str(dinov2)  # what reads a model never needs the teacher
  assert from_config.evaluate(loaded, params).scalars


def test_compiled_ahead_of_time_without_a_teachers_files():
  for fields, dtype in ((dict(), "float32"), (dict(latents="x", teacher="y"), "float16")):
    config = config_of(dict(teacher="/nowhere"), fast=False)
    if fields:
      config.vae.update(
        dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(8,), layers_per_block=1, norm_groups=4)
      )
    config.data.update(fields)
    job = compile_jobs.make_job(config, "train", sharding.make_mesh(), 2, None)
    shape = job.args[1]["teacher"]
    assert (shape.shape, shape.dtype) == ((16, GRID**2, FEATURES), dtype)
    assert job.flops == pytest.approx(flops.train(config, 16, False), rel=2e-5)
    assert job.lower().out_info is not None


def test_benchmark_job(monkeypatch):
  """Three variants in turn, which share common parts of their states; FLOPs of each."""
  config = config_of(fast=False)
  with pytest.raises(ValueError, match="repa.features 32 is the width of no DINOv2: they have 384, 768, 1024, 1536"):
    benchmark_repa.check(config)
  with pytest.raises(ValueError, match="the job 'repa' needs REPA: set repa.weight=1"):
    benchmark_repa.check(config_of(dict(weight=0.0)))
  sizes = dict(patch_size=14, grid=4, width=FEATURES, depth=1, head_dim=16, mlp_hidden=32)
  monkeypatch.setattr(benchmark_repa, "teacher_sizes", lambda width: sizes)
  rows = benchmark_repa.RepaBenchmark(config, ("plain",), 2, True).run("repa", None, 2, 100.0)
  assert [(row.path, len(row.seconds)) for row in rows] == [(way, 2) for way in benchmark_repa.WAYS]
  off, ready, in_step = (row.flops for row in rows)
  assert (ready - off, in_step - ready) == (6 * flops.projector(config), 2 * flops.vit(sizes, GRID))
  assert rows[1].program == rows[2].program != rows[0].program
  costs = benchmark_repa.costs(rows)
  assert [cost["path"] for cost in costs] == ["features", "teacher"]
  assert all(cost["min"] <= cost["max"] and cost["rounds"] == 2 for cost in costs)
  assert costs[0]["flops_over_off"] == ready / off


def test_configs_of_the_paper_use_repa():
  for model in ("d12_d12_in1k", "d18_d18_in1k", "d18_d28_in1k", "d18_d28_dfn"):
    c = parse(f"flextok:{model}")
    assert (c.repa.weight, c.repa.block, c.repa.features, repa.teacher_grid(c)) == (1.0, 1, 1024, 16)
  share = 3 * flops.projector(c) / flops.train(c, 1024, True) * 1024
  assert share < 0.02
  c = parse("flextok:d12_d12_in1k")
  assert 3 * flops.projector(c) / flops.train(c, 1024, True) * 1024 < 0.05


# Refusals.


def refused(words, call, error=ValueError):
  with pytest.raises(error, match=words) as caught:
    call()
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(block=4), "repa.block 4 is not one of the 3 blocks of the decoder"),
    (dict(block=0), "repa.block must be a whole number from 1 .*, got 0"),
    (dict(weight=-1.0), "repa.weight must be a finite number of at least 0, got -1.0"),
    (dict(weight=float("nan")), "repa.weight must be a finite number of at least 0, got nan"),
    (dict(grid=-1), "repa.grid must be a whole number from 0"),
    (dict(hidden=0), "repa.hidden must be a whole number from 1"),
    (dict(dtype="int8"), "repa.dtype must be one of bfloat16"),
  ],
)
def test_invalid_values(fields, words):
  refused(words, lambda: make_stage(config_of(fields)))


def test_missing_or_different_teacher(dinov2, tmp_path):
  mesh = sharding.make_mesh()
  prepare = functools.partial(inputs.make_prepare, mesh=mesh, train=True)
  missing = "REPA needs its teacher: set repa.teacher to .*repa.weight=0 .*no such vision transformer"
  refused(
    missing,
    lambda: train.train(config_of(dict(teacher=str(tmp_path / "none"))), str(tmp_path / "run")),
    FileNotFoundError,
  )
  assert not (tmp_path / "run" / "config.json").exists()
  wide = config_of(dict(teacher=str(dinov2), features=64))
  refused("repa.features=64, but the features of the teacher .* have 32: set repa.features=32", lambda: prepare(wide))
  config = config_of(dict(teacher=str(dinov2)))
  config.data.latents = "somewhere"
  refused("no images for REPA's teacher.*--what=dino.*set data.teacher to", lambda: prepare(config))
  config.data.update(dict(latents="", teacher="somewhere"))
  refused("data.teacher goes with data.latents", lambda: prepare(config))
