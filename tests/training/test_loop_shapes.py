"""Runs on batches of several shapes: programs, metrics, killed and resumed runs, several processes, bad shapes."""

import json
from unittest import mock

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file

from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import goodput, inputs, loop
from flextok_jax.weights import loading
from tests.parallel.test_processes import launch
from tests.support.commands import shell
from tests.support.runs import assert_trees_equal, config_of, fails, read_metrics
from tests.training.test_loop import train_only

SHAPES, WEIGHTS = ((16, 16), (8, 24), (12, 8)), (0.5, 0.25, 0.25)
SCALED = dict(posemb_scaling="scaled")


def mixed(shapes=SHAPES, weights=WEIGHTS, data=None, **overrides):
  data = dict(shapes=shapes, shape_weights=weights) | (data or {})
  settings = dict(num_steps=8, log_every=1, checkpoint_every=8, eval_every=8)
  return config_of(encoder=SCALED, decoder=SCALED, data=data, train=settings, **overrides)


@pytest.fixture
def traced(monkeypatch):
  """The shapes of the images of which an update was traced, one for each program."""
  found, make = [], loop.make_update

  def counting(*args, **kwargs):
    update = make(*args, **kwargs)

    def traced_update(state, batch, key):
      found.append(batch["image"].shape)
      return update(state, batch, key)

    return traced_update

  monkeypatch.setattr(loop, "make_update", counting)
  make_mesh = sharding.make_mesh
  with mock.patch.object(sharding, "make_mesh", lambda **mesh: make_mesh(**mesh, devices=jax.devices()[:1])):
    yield found


def test_one_program_for_each_shape(tmp_path, traced, capsys):
  train_only(mixed(), tmp_path)
  assert sorted(traced) == sorted((8, *shape, 3) for shape in SHAPES)
  out = capsys.readouterr().out
  lines = [line for line in out.splitlines() if line.startswith("compiled update")]
  assert {line.split(": ")[0] for line in lines} == {f"compiled update {i} of 3" for i in (1, 2, 3)}
  assert {line.split(": ")[1] for line in lines} == {f"{h} x {w} pixels" for h, w in SHAPES}
  assert "height x width  batches  pictures" in out
  lines, _ = read_metrics(tmp_path)
  assert [x["step"] for x in lines] == list(range(1, 9)) and all(np.isfinite(x["loss"]) for x in lines)


def test_one_square_shape_trains_as_image_size(tmp_path, traced):
  quick = dict(num_steps=2, checkpoint_every=2)
  configs = mixed(((16, 16),), (1.0,)), mixed((), ())
  weights = []
  for i, config in enumerate(configs):
    config.train.update(quick)
    train_only(config, tmp_path / str(i))
    weights.append(loading.load(str(tmp_path / str(i) / "checkpoints" / "2"))[1])
  assert_trees_equal(*weights)
  assert len(traced) == 2


def test_a_folder_of_pictures_trains_in_their_shapes(tmp_path, traced, capsys):
  for i in range(12):
    size = ((30, 30), (60, 20))[i % 3 == 0]  # width, height
    path = tmp_path / "pictures" / f"{i}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (20 * i, 0, 0)).save(path)
  folder = dict(weight=1.0, path=str(tmp_path / "pictures"), val_path=str(tmp_path / "held_out"))
  data = dict(sources=dict(synthetic=dict(weight=0.0), folder=folder))
  config = mixed(weights=(), data=data)
  config.train.num_steps = 6
  train_only(config, tmp_path / "run")
  assert set(traced) == {(8, 16, 16, 3), (8, 8, 24, 3)} and len(traced) == 2
  out = capsys.readouterr().out
  assert "compiled update 2 of 2" in out and "16 x 16    66.7%         8  100.0%      100.0%      0.0%" in out


def test_the_mean_cost_of_the_shapes_is_counted():
  config = mixed()
  buckets = inputs.open_buckets(config)
  cost = {bucket.shape: goodput.update_flops(config, bucket.shape) for bucket in buckets}
  assert cost[16, 16] == goodput.update_flops(config) and cost[12, 8] < cost[8, 24] < cost[16, 16]
  device = mock.Mock(flops=1e9)
  with mock.patch.object(goodput.accelerators, "known", lambda _: device):
    found = goodput.make_mfu(config, jax.devices()[:1], buckets)(1e3)
  mean = sum(cost[shape] * weight for shape, weight in zip(SHAPES, WEIGHTS)) / 8
  assert found == {"mfu": pytest.approx(mean * 1e3 / 1e9)}


# Bit for bit.

COMMAND = [
  "--config=configs/debug.py",
  f"--config.data.shapes={SHAPES[:2]}",
  "--config.data.shape_weights=(2, 1)",
  "--config.encoder.posemb_scaling=scaled",
  "--config.decoder.posemb_scaling=scaled",
  "--config.train.num_steps=12",
  "--config.train.log_every=1",
  "--config.train.checkpoint_every=6",
  "--config.train.eval_every=12",
  "--config.train.export_dtype=float32",
  "--config.eval.num_tokens=(4,)",
  "--config.sampler.num_steps=1",
  "--config.sampler.guidance=none",
]


def losses(workdir):
  lines, _ = read_metrics(workdir)
  return {x["step"]: x["loss"] for x in lines}


def same_bits(workdir, other):
  weights, expected = (load_file(path / "weights.safetensors") for path in (workdir, other))
  assert weights.keys() == expected.keys() and len(weights) > 10
  for name, array in weights.items():
    np.testing.assert_array_equal(array, expected[name], err_msg=name)
  assert losses(workdir) == losses(other)


def test_a_killed_run_ends_bit_identical(tmp_path):
  code, out, err = shell("flextok_jax.train", *COMMAND, f"--workdir={tmp_path / 'undisturbed'}")
  assert code == 0 and out.count("compiled update") == 2, err
  killed = tmp_path / "killed"
  assert shell("tests.support.killed_run", "logged 9 SIGKILL", *COMMAND, f"--workdir={killed}")[0] == -9
  code, out, err = shell("flextok_jax.train", *COMMAND, f"--workdir={killed}")
  assert code == 0 and "resuming from step 6" in out, err
  same_bits(killed, tmp_path / "undisturbed")


def test_two_processes_compute_the_bits_of_one(tmp_path):
  """On the same number of devices."""
  command = ["python", "-m", "flextok_jax.train", *COMMAND]
  for processes in (1, 2):
    done = launch(processes, *command, f"--workdir={tmp_path / str(processes)}", devices=2 // processes)
    assert done.returncode == 0 and done.stdout.count("compiled update") == 2, done.stderr
  same_bits(tmp_path / "2", tmp_path / "1")


# Bad shapes.


@pytest.mark.parametrize(
  "shapes,fields,words",
  [
    (((16, 18),), {}, "data.shapes has 16 x 18 pixels, but height and width must be multiples of 4, as are 16 x 16"),
    (
      ((8, 24),),
      {"encoder.posemb_scaling": "absolute"},
      "8 x 24 pixels, 2 x 6 patches of the encoder, which has 4 x 4 positions: set encoder.max_grid to 6 or",
    ),
    (((8, 24),), {"decoder.posemb_scaling": "absolute"}, "patches of the decoder, .* or decoder.posemb_scaling to"),
    (((16, 16, 3),), {}, r"data.shapes must be different pairs \(height, width\) of whole numbers from 1 to 4096"),
    (((16, 16), (16, 16)), {}, "data.shapes must be different pairs"),
    (((0, 16),), {}, "data.shapes must be different pairs"),
    (
      SHAPES,
      {"tokens.layout": "grid", "tokens.num_registers": 16, "tokens.nested_dropout": "none"}
      | {"decoder.modulation": "shared"},
      "data.shapes must be .* with tokens.layout 'grid'",
    ),
  ],
)
def test_a_shape_that_does_not_fit_is_one_line(shapes, fields, words):
  config = mixed(shapes)
  config.update_from_flattened_dict(fields)
  fails(words, make_stage, config)


@pytest.mark.parametrize(
  "fields,words", [({"stage": "ar"}, "stage 'ar'"), ({"data.trajectories": "x"}, "data.trajectories")]
)
def test_shapes_without_images_are_refused(fields, words):
  config = mixed()
  config.update_from_flattened_dict(fields)
  fails(f"data.shapes has no effect with {words}: set data.shapes", inputs.check_new, config)


def test_a_vae_trains_on_several_shapes():
  vae = dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)
  fails("multiples of 2", make_stage, mixed(((15, 16),), stage="vae", vae=vae))
  config = mixed(stage="vae", vae=vae)
  stage = make_stage(config)
  assert stage.vae.downscale == 2
  losses = [
    jax.eval_shape(
      stage.loss_fn,
      {**stage.init(jax.random.key(0))[0]},
      {"image": jax.ShapeDtypeStruct((2, *shape, 3), np.uint8)},
      jax.random.key(0),
      0,
    )[0].shape
    for shape in SHAPES
  ]
  assert losses == [()] * 3 and json.dumps(losses)
