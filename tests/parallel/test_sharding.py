"""The device mesh, and shardings of parameters, batches and intermediate results: they change no number."""

import collections
import functools
import math
import re
import types

from flax.core.meta import unbox
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict
import numpy as np
import pytest

from flextok_jax.configs import ar, debug, flextok
from flextok_jax.data import pipeline
from flextok_jax.inference import generator as generation
from flextok_jax.inference import tokenizer as api
from flextok_jax.ops import layout
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs, optim
from flextok_jax.training import metrics as metrics_lib
from flextok_jax.training.state import init_state, make_update, state_shardings
from tests.support.tiny import make_params

STEPS = 10
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (4, 1, 2), "mixed": (2, 2, 2)}  # data, fsdp, tensor


def mesh_of(data=-1, fsdp=1, tensor=1, slices=1, devices=None):
  return sharding.make_mesh(data, fsdp, tensor, slices, devices)


# The mesh.


def test_minus_one_is_the_rest_of_the_devices():
  assert dict(mesh_of(fsdp=2, tensor=2).shape) == dict(data=2, fsdp=2, tensor=2)
  assert dict(mesh_of(data=1, fsdp=-1).shape) == dict(data=1, fsdp=8, tensor=1)
  assert dict(mesh_of(data=1, tensor=-1, devices=jax.devices()[:4]).shape) == dict(data=1, fsdp=1, tensor=4)
  assert dict(sharding.make_mesh().shape) == dict(data=8, fsdp=1, tensor=1)


@pytest.mark.parametrize(
  "sizes, pattern",
  [
    (dict(data=3), "data=3, fsdp=1, tensor=1 does not match the 8 devices of this run"),
    (dict(data=4), "data=4, fsdp=1, tensor=1 does not match the 8 devices"),
    (dict(fsdp=3), "data=-1, fsdp=3, tensor=1 does not match the 8 devices"),
    (dict(fsdp=16), "does not match the 8 devices"),
    (dict(fsdp=-1), "data=-1, fsdp=-1, tensor=1: sizes are at least 1, and one of them may be -1"),
    (dict(tensor=0), "tensor=0: sizes are at least 1"),
    (dict(fsdp=2.0), "fsdp=2.0"),
    (dict(slices=3), "data=8 is not divisible by slices=3"),
    (dict(slices=0), "slices=0"),
    (dict(slices=2), "slices=2 does not suit these 8 devices"),  # all of one process
  ],
)
def test_sizes_that_do_not_multiply_to_the_devices(sizes, pattern):
  with pytest.raises(ValueError, match=pattern) as error:
    mesh_of(**sizes)
  assert "\n" not in str(error.value)


def pod(slices, hosts, chips, **fields):
  """Devices of a described machine, by hosts of each slice."""
  make = lambda i, s, h: types.SimpleNamespace(
    id=i, process_index=s * hosts + h, platform="cpu", device_kind="cpu", **({"slice_index": s} if fields else {})
  )
  where = [(s, h) for s in range(slices) for h in range(hosts) for _ in range(chips)]
  return [make(i, *sh) for i, sh in enumerate(where)]


@pytest.mark.parametrize("by_slice", [True, False])
def test_only_the_data_axis_crosses_slices(monkeypatch, by_slice):
  """Slices, or processes if devices have no slices, in any order of the devices."""
  made = {}
  monkeypatch.setattr(sharding, "Mesh", lambda devices, *args, **kwargs: made.setdefault("devices", devices))
  devices = pod(2, 2, 4, slice=True) if by_slice else pod(2, 1, 8)
  mesh_of(fsdp=4, tensor=2, slices=2, devices=devices[::2] + devices[1::2])
  where = np.vectorize(lambda device: getattr(device, "slice_index", device.process_index))(made["devices"])
  assert where.shape == (2, 4, 2) and (where == np.arange(2)[:, None, None]).all()


def test_slices_of_tpus_must_be_given():
  devices = pod(2, 1, 4, slice=True)
  for device in devices:
    device.platform = "tpu"
  with pytest.raises(ValueError, match="these devices are 2 slices: set slices=2"):
    mesh_of(devices=devices)


# Rows of the batch.


@pytest.mark.parametrize("sizes", [*MESHES.values(), (1, 2, 4), (1, 1, 8)])
@pytest.mark.parametrize(
  "owners",
  [  # process of each device
    (0, 0, 0, 0, 1, 1, 1, 1),
    (0, 1, 2, 3, 4, 5, 6, 7),
    (0, 0, 1, 1, 0, 0, 1, 1),
    (0, 1, 1, 1, 1, 1, 1, 1),
  ],
)
def test_processes_read_the_rows_of_their_devices(monkeypatch, sizes, owners):
  """Also if tensor shards of a row are in several processes, and if the rows of a process are not contiguous."""
  mesh, batch = mesh_of(*sizes), np.arange(16)
  parts = sharding.batch_parts(mesh)
  placed = sharding.batch_sharding(mesh)
  device_of = collections.namedtuple("Device", ("id", "process_index"))
  fake = types.SimpleNamespace(
    devices_indices_map=lambda shape: {
      device_of(device.id, owners[device.id]): index for device, index in placed.devices_indices_map(shape).items()
    }
  )
  monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: fake)
  for process in set(owners):
    blocks, count = sharding.process_blocks(mesh, process)
    assert blocks == sorted(set(blocks)) and parts % count == 0
    rows = np.concatenate([np.split(batch, count)[i] for i in blocks])
    needed = [
      batch[index[0]] for device, index in placed.devices_indices_map((16,)).items() if owners[device.id] == process
    ]
    np.testing.assert_array_equal(rows, np.unique(np.concatenate(needed)))


def test_batches_are_sharded_over_data_and_fsdp():
  mesh = mesh_of(2, 2, 2)
  assert sharding.batch_parts(mesh) == 4
  (batch,) = sharding.device_batches(iter([{"x": np.arange(8)}]), sharding.batch_sharding(mesh))
  for shard in batch["x"].addressable_shards:
    data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
    np.testing.assert_array_equal(shard.data, np.arange(2) + 2 * (2 * data + fsdp))
  sharding.check_batch(8, 2, mesh)
  with pytest.raises(ValueError, match=r"global_batch=8 is not divisible by 4 devices x accumulate_steps=4"):
    sharding.check_batch(8, 4, mesh)


# Parameters.

FULL = {  # and their optimisers
  "d12_d12": (functools.partial(flextok.get_config, "d12_d12_in1k"), "muon"),  # with a VAE
  "ar_85m": (functools.partial(ar.get_config, "85m"), "adamw"),
  "ar_3b": (functools.partial(ar.get_config, "3b"), "muon"),
}


def axes_of(spec):
  """The mesh axes of each dimension as tuples."""
  return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]


@pytest.mark.parametrize("name", FULL)
def test_fsdp_shards_everything_above_a_mebibyte(name):
  """Parameters, their average, frozen parts and all of the optimiser's state."""
  make_config, optimizer = FULL[name]
  config = make_config()
  config.optim.name = optimizer
  make = lambda key: init_state(make_stage(config), optim.make_optimizer(config.optim, 10), key)
  boxed = jax.eval_shape(make, jax.random.key(0))
  for sizes in ((1, 8, 1), (2, 2, 2), (2, 4, 1)):
    mesh = mesh_of(*sizes)
    leaves = zip(
      jax.tree_util.tree_leaves_with_path(unbox(boxed)),
      jax.tree.leaves(sharding.tree_shardings(boxed, mesh)),
      strict=True,
    )
    large = 0
    for (path, x), place in leaves:
      where = f"{jax.tree_util.keystr(path)} {x.shape} {place.spec}"
      axes = sum(axes_of(place.spec), ())
      assert len(axes) == len(set(axes)), where
      whole, part = (math.prod(shape) * x.dtype.itemsize for shape in (x.shape, place.shard_shape(x.shape)))
      if whole > 2**20:
        assert "fsdp" in axes and part <= whole / sizes[1], where
        assert place.spec[0] is None or "layers" not in where, where
        large += 1
      else:
        assert "fsdp" not in axes, where
    assert large > 20


def boxed_array(shape, *names):
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
  "shape, names, expected",
  [
    ((1024, 3, 16, 64), ("embed", None, "heads", "head_dim"), P("fsdp", None, "tensor", None)),
    ((12, 1024, 2048), ("layers", "embed", "mlp"), P(None, "fsdp", "tensor")),
    ((1024, 3, 15, 64), ("embed", None, "heads", "head_dim"), P("fsdp", None, None, None)),  # 15 heads on 2
    ((1023, 2048), ("embed", "mlp"), P(None, ("tensor", "fsdp"))),  # the width is odd
    ((1024, 1024), ("embed", "embed"), P("fsdp", None)),  # used twice
    ((1024, 513), (None, None), P("fsdp", None)),  # no names
    ((12, 1023, 511), ("layers", "embed", "mlp"), P("fsdp", None, None)),  # no other dimension is divisible
    ((1023, 511), ("embed", "mlp"), P(None, None)),
    ((2, 128), ("embed", "mlp"), P(None, "tensor")),  # small
  ],
)
def test_an_axis_skips_dimensions_that_are_not_divisible(shape, names, expected):
  place = sharding.tree_shardings({"x": boxed_array(shape, *names)}, mesh_of(2, 2, 2))["x"]
  assert axes_of(place.spec) == axes_of(expected)


@pytest.mark.parametrize(
  "shape, names, expected",
  [
    ((12, 1024, 2048), ("layers", "embed", "mlp"), P(None, "fsdp", ("tensor", "data"))),
    ((1024, 3, 16, 64), ("embed", None, "heads", "head_dim"), P(("fsdp", "data"), None, "tensor", None)),
    ((12, 1023, 511), ("layers", "embed", "mlp"), P(("fsdp", "data"), None, None)),
    ((1023, 511), ("embed", "mlp"), P(None, None)),
    ((2, 128), ("embed", "mlp"), P(None, "tensor")),  # small
  ],
)
def test_what_only_the_update_reads_is_sharded_over_data_too(shape, names, expected):
  leaf = {"x": boxed_array(shape, *names)}
  place = sharding.tree_shardings(leaf, mesh_of(2, 2, 2), over_data=True)["x"]
  assert axes_of(place.spec) == axes_of(expected)
  sizes = dict(data=2, fsdp=2, tensor=2)
  assert sharding.part_sizes(leaf, sizes, over_data=True)["x"] == math.prod(place.shard_shape(shape))
  whole = sharding.tree_shardings(leaf, mesh_of(2, 2, 2))["x"]
  assert sharding.part_sizes(leaf, sizes)["x"] == math.prod(whole.shard_shape(shape))


@pytest.mark.parametrize("rows, split", [(16, 2), (12, 2), (4, 1), (3, 3)])
def test_a_batch_that_does_not_divide_is_padded(rows, split):
  """Each device computes whole results of its rows; less than half a row per device is left to the compiler."""
  mesh, names = mesh_of(*MESHES["fsdp"]), ("batch", None)
  put = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(rows, 64)).astype(np.float32)
  w = rng.normal(size=(64, 128)).astype(np.float32)

  @jax.jit
  def apply(x, w):
    return layout.constrain(layout.constrain(x, *names) @ w, *names)

  placed = put(x, P()), put(w, P("fsdp", None))
  found, text = apply(*placed), apply.lower(*placed).compile().as_text()
  np.testing.assert_allclose(found, x @ w, rtol=1e-4, atol=1e-4)
  shapes = re.findall(r" = f32\[([\d,]+)\]\S* dot\(", text)
  assert shapes == [f"{split},128"]


# The same numbers on any mesh.


def tokenizer_config():
  c = debug.get_config()
  half = dict(mlp_ratio=3.0)  # 64 hidden units: 85 would not divide
  c.update(
    encoder=half,
    decoder=dict(half, depth=2),
    tokens=dict(bucket_rows=2),
    data=dict(global_batch=16),
    optim=dict(warmup_steps=2),
  )
  return c


def ar_config():
  c = debug.get_config()
  c.update(
    stage="ar",
    ar=dict(width=32, depth=2, head_dim=16, num_ids=64, num_tokens=8, num_classes=4),
    data=dict(global_batch=16),
    optim=dict(warmup_steps=2),
  )
  return c


def finetuning_config():
  """Trains the encoder, and LoRA of the frozen decoder."""
  c = tokenizer_config()
  c.update(lora=dict(rank=4, parts=("decoder",)))
  return c


def batches_of(config):
  if config.stage == "tokenizer":
    sizes = dict(global_batch=config.data.global_batch, image_size=config.image_size)
    batches = pipeline.train_batches(inputs.image_data(config), **sizes, seed=0)
    return [next(batches) for _ in range(STEPS)]
  rng, rows = np.random.default_rng(0), config.data.global_batch
  draw = lambda high, *shape: rng.integers(0, high, (rows, *shape), dtype=np.int32)
  return [
    dict(token_ids=draw(64, 8), length=np.full(rows, 8, np.int32), label=draw(4), unreadable=draw(1))
    for _ in range(STEPS)
  ]


def update_on(config, mesh, shard_update=False):
  """Returns the jitted update, and the initial state as a jitted function of the key."""
  stage, optimizer = make_stage(config), optim.make_optimizer(config.optim, STEPS)
  init = lambda key: init_state(stage, optimizer, key)
  shardings = state_shardings(jax.eval_shape(init, jax.random.key(0)), mesh, shard_update)
  update = jax.jit(
    make_update(stage, optimizer, accumulate_steps=config.optim.accumulate_steps, decay=0.9),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  return update, jax.jit(lambda key: unbox(init(key)), out_shardings=shardings)


def run_on(config, mesh, batches, shard_update=False):
  """The losses of all steps, and the last state."""
  update, init = update_on(config, mesh, shard_update)
  state, losses = init(jax.random.key(0)), []
  for batch in sharding.device_batches(iter(batches), sharding.batch_sharding(mesh)):
    state, metrics = update(state, batch, jax.random.key(1))
    losses.append(metrics)
  return [metrics_lib.compute(m)["loss"] for m in losses], state


@pytest.fixture(scope="module")
def alone():
  """Of each config what one device computes."""
  out = {}
  for make in (tokenizer_config, finetuning_config, ar_config):
    config = make()
    batches = batches_of(config)
    out[make] = config, batches, run_on(config, mesh_of(devices=jax.devices()[:1]), batches)
  return out


@pytest.mark.parametrize(
  "make, name, shard_update",
  [
    *((ar_config, name, False) for name in MESHES),
    (ar_config, "data", True),
    (tokenizer_config, "mixed", False),
    (finetuning_config, "mixed", True),
  ],
)
def test_a_mesh_changes_no_loss(monkeypatch, alone, make, name, shard_update):
  """Ten steps of AdamW, up to float32 rounding; every matrix is sharded according to the mesh."""
  monkeypatch.setattr(sharding, "SMALL", 1024)
  config, batches, (expected, _) = alone[make]
  mesh = mesh_of(*MESHES[name])
  losses, state = run_on(config, mesh, batches, shard_update)
  assert len(losses) == STEPS and len(set(losses)) == STEPS
  np.testing.assert_allclose(losses, expected, rtol=2e-5)
  used = lambda tree: {axis for x in jax.tree.leaves(tree) for axis in sum(axes_of(x.sharding.spec), ())}
  several = {axis for axis, size in mesh.shape.items() if size > 1}
  assert used(state.params) == several - {"data"}
  assert used(state.ema) == used(state.opt_state) == (several if shard_update else several - {"data"})


@pytest.mark.parametrize(
  "name, remat, rows", [("data", "full", 4), ("fsdp", "dots", 4), ("mixed", "none", 4), ("fsdp", "full", 16)]
)
def test_a_mesh_changes_no_gradient(monkeypatch, name, remat, rows):
  """Of each parameter of a tokenizer with several buckets, all arrays sharded that can be; also of shared groups."""
  monkeypatch.setattr(sharding, "SMALL", 0)
  config = tokenizer_config()
  config.update(tokens=dict(num_registers=16, nested_dropout="uniform", bucket_rows=rows), data=dict(global_batch=32))
  config.remat = remat
  stage, images = make_stage(config), batches_of(config)[0]["image"]
  buckets = stage._buckets(rows)
  shared = [(end - first) * (32 // rows) % 8 for first, end, _ in buckets]
  assert len(buckets) > 1 and any(shared) == (rows == 16)
  boxed = jax.eval_shape(stage.init_model, jax.random.key(0))[0]
  grad = lambda params, images: jax.grad(lambda p: stage.loss_fn(p, {"image": images}, jax.random.key(1), 0)[0])(params)
  params, mesh = make_params(stage), mesh_of(*MESHES[name])
  places = sharding.tree_shardings(boxed, mesh), sharding.batch_sharding(mesh)
  expected = jax.jit(grad)(params, images)
  found = jax.jit(grad, out_shardings=places[0])(*jax.device_put((params, images), places))
  for (path, a), b in zip(jax.tree.leaves_with_path(jax.device_get(found)), jax.tree.leaves(expected), strict=True):
    assert np.abs(b).max() > 0 and np.abs(a - b).max() < 1e-4 * np.abs(b).max(), jax.tree_util.keystr(path)


@pytest.fixture
def compiled_anew():
  """Programs compiled by this test bypass the compilation cache."""
  seconds = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
  yield
  jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.mark.usefixtures("compiled_anew")
def test_gradients_are_summed_in_the_type_that_computes_them(tmp_path):
  """What the partitioner puts between devices: of the blocks' matrices in config.dtype, of the rest in float32."""
  config, mesh = ar_config(), mesh_of()
  config.dtype = "bfloat16"
  update, init = update_on(config, mesh)
  (batch,) = sharding.device_batches(iter(batches_of(config)[:1]), sharding.batch_sharding(mesh))
  key, state = jax.random.key(0), jax.eval_shape(init, jax.random.key(0))
  dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
  update.lower(state, batch, key).compile(compiler_options=dump)
  (text,) = [path.read_text() for path in tmp_path.glob("*update*after_spmd-partitioning*")]
  sums = set(re.findall(r"= (\w+)\[([\d,]*)\]\S* all-reduce\(", text))
  in_bfloat16 = {math.prod(map(int, shape.split(","))) for dtype, shape in sums if dtype == "bf16"}
  kernels = {
    math.prod(x.shape[1:]) // (3 if path[-2].key == "qkv" else 1)  # whose products are three
    for path, x in jax.tree_util.tree_leaves_with_path(state.params["ar"]["blocks"])
    if path[-1].key == "kernel"
  }
  assert in_bfloat16 == kernels and len(kernels) > 1
  others = {x.shape for path, x in jax.tree_util.tree_leaves_with_path(state.params) if path[-1].key != "kernel"}
  in_float32 = {tuple(map(int, shape.split(","))) for dtype, shape in sums if dtype == "f32" and shape}
  assert (64, 32) in in_float32 & others  # the embedding


def on_both(config, monkeypatch):
  """Random parameters of a model on one device, and over the mixed mesh."""
  monkeypatch.setattr(sharding, "SMALL", 1024)
  abstract = jax.eval_shape(make_stage(config).init, jax.random.key(0))[0]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), unbox(abstract))
  return params, jax.device_put(params, sharding.tree_shardings(abstract, mesh_of(*MESHES["mixed"])))


def rows_are_shared_out(x, parts):
  assert x.sharding.shard_shape(x.shape)[0] == len(x) // parts, x.sharding


def test_a_tokenizer_on_a_mesh(monkeypatch):
  """Arrays without a sharding, as callers pass them, are processed in shards of the batch."""
  config = tokenizer_config()
  images = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), np.uint8)
  noise = np.random.default_rng(2).normal(size=(8, 16, 16, 3)).astype(np.float32)
  results = []
  for params in on_both(config, monkeypatch):
    model = api.FlexTok(params, FrozenConfigDict(config))
    ids = model.tokenize(images)
    results.append((ids, model.detokenize(np.asarray(ids), noise=noise, num_steps=2, guidance="cfg")))
  (ids, restored), (expected_ids, expected) = results[1], results[0]
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_allclose(restored, expected, atol=1e-4)
  for x in (ids, restored):
    rows_are_shared_out(x, 4)


def test_a_generator_on_a_mesh(monkeypatch):
  config = ar_config()
  drawn = []
  for params in on_both(config, monkeypatch):
    gen = generation.ARGenerator(params, FrozenConfigDict(config))
    drawn.append(gen.generate(jax.random.key(3), np.arange(8) % 4, guidance_scale=2.0, return_log_probs=True))
  (expected_ids, expected), (ids, log_probs) = drawn
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_allclose(log_probs, expected, atol=1e-4)
  rows_are_shared_out(ids, 4)
