"""Weights files, checkpoints and claiming a workdir."""

import errno
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flextok_jax import train
from flextok_jax.config import read_config
from flextok_jax.core import tensor_file
from flextok_jax.training import checkpoint
from flextok_jax.training.state import TrainState
from flextok_jax.weights import loading, orbax, saving
from tests.support.runs import assert_trees_equal, config_of, fails, files_of, random_state

VAE = dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(4,), layers_per_block=1, norm_groups=2)


def shapes_of(state):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


@pytest.fixture(scope="module")
def config():
  return config_of()


@pytest.fixture(scope="module")
def params(config):
  return random_state(config).params


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
  """Returns a workdir with checkpoints of steps 3 and 5."""
  path = tmp_path_factory.mktemp("workdir")
  save_states(path, config, random_state(config, 3, seed=3), random_state(config, 5, seed=5))
  return path


def save_states(path, config, *states, keep=2, keep_period=0):
  checkpoint.claim_workdir(str(path), config)
  checkpoints = checkpoint.Checkpoints(str(path), keep=keep, keep_period=keep_period)
  for state in states:
    checkpoints.save(state)
  checkpoints.close()


# Weights files.


def test_weights_round_trip(config, params, tmp_path):
  path = str(tmp_path / "new" / "weights.safetensors")
  saving.save_weights(path, config, params)
  again_config, again = loading.load(path)
  assert again_config == config and again_config.is_locked
  assert_trees_equal(again, params)
  assert {x.dtype for x in jax.tree.leaves(again)} == {jnp.dtype("float32")}
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["weights.safetensors"]


def test_bfloat16_weights(config, params, tmp_path):
  """Half the size; exact for values that bfloat16 represents, otherwise rounded to its 8 bits."""
  small, large = str(tmp_path / "small.safetensors"), str(tmp_path / "large.safetensors")
  saving.save_weights(small, config, params, "bfloat16")
  saving.save_weights(large, config, params)
  assert Path(small).stat().st_size < 0.6 * Path(large).stat().st_size
  rounded = loading.load(small)[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), rounded, params)
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(params)))
  saving.save_weights(small, config, rounded, "bfloat16")
  assert_trees_equal(loading.load(small)[1], rounded)


def test_a_failed_write_keeps_the_old_file(config, params, tmp_path, monkeypatch):
  path = tmp_path / "weights.safetensors"
  saving.save_weights(str(path), config, params)
  before = path.read_bytes()

  def full_disk(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(tensor_file.os, "replace", full_disk)
  fails("cannot write .*: No space left on device", saving.save_weights, str(path), config, params)
  assert [p.name for p in tmp_path.iterdir()] == [path.name]
  assert path.read_bytes() == before


def test_damaged_and_foreign_weights_are_one_line_errors(config, params, tmp_path):
  path = tmp_path / "weights.safetensors"
  saving.save_weights(str(path), config, params)
  good = path.read_bytes()
  load = lambda: loading.load(str(path))
  for damaged in (good[: len(good) // 2], good[:-1], good[:7], b"", b"\0" * 64, b"\xff" * len(good), b"PK\3\4" + good):
    path.write_bytes(damaged)
    fails(f"{path} is not a whole safetensors file", load)
  path.write_bytes(good[:100] + bytes(b ^ 255 for b in good[100:200]) + good[200:])
  fails(f"{path} is not a whole safetensors file", load)
  save_file({"a": np.zeros(3, np.float32)}, path)
  fails("is no FlexTok checkpoint: its metadata has neither", load)
  fails("no such checkpoint: .*absent; give a", loading.load, str(tmp_path / "absent"))
  (tmp_path / "empty").mkdir()
  fails("empty holds no checkpoint", loading.load, str(tmp_path / "empty"))


@pytest.mark.parametrize(
  "text, pattern",
  [
    ("{", "is not JSON"),
    ("[1, 2]", "does not name a stage"),
    ("null", "does not name a stage"),
    ('{"a": 1}', "does not name a stage"),
    ('{"stage": 7}', "stage must be one of tokenizer, vae, ar, distill, got 7"),
    ("stage", "stage must be one of tokenizer, vae, ar, distill, got 'dance'"),
    ("width", "describes no model|shape"),  # a config of other sizes than the arrays
    ("depth", "lacks the tensor .*blocks.*, which its configuration asks for"),
    ("registers", "has shape .*, expected"),
    ("negative", "encoder.width must be a whole number from 1 to 65536, got -32"),
    ("text", "decoder.patch_size must be a whole number from 1 to 4096, got 'four'"),
  ],
)
def test_invalid_configs_in_weights_are_one_line_errors(config, params, tmp_path, text, pattern):
  values = json.loads(config.to_json())
  changes = dict(
    width=("encoder", "width", 48),
    depth=("decoder", "depth", 3),
    registers=("tokens", "num_registers", 8),
    negative=("encoder", "width", -32),
    text=("decoder", "patch_size", "four"),
  )
  if text == "stage":
    text = json.dumps(values | dict(stage="dance"))
  if text in changes:
    part, name, value = changes[text]
    values[part][name] = value
    text = json.dumps(values)
  path = tmp_path / "weights.safetensors"
  saving.save_weights(str(path), config, params)
  save_file(load_file(path), path, metadata={"format": "flextok_jax", "flextok_jax.config": text})
  fails(pattern, loading.load, str(path))


# Checkpoints.


def test_checkpoint_round_trip(config, workdir):
  state = random_state(config, 5, seed=5)
  checkpoints = checkpoint.Checkpoints(str(workdir))
  assert checkpoints.latest_step() == 5
  again = checkpoints.restore(shapes_of(state))
  checkpoints.close()
  assert isinstance(again, TrainState) and int(again.step) == 5
  assert_trees_equal(again, state)
  assert jax.tree.structure(again) == jax.tree.structure(state)


def test_weights_of_a_workdir_are_the_average_and_frozen_parts(workdir, tmp_path):
  before = files_of(workdir)
  _, params = loading.load(str(workdir))
  assert_trees_equal(params, random_state(config_of(), 5, seed=5).ema)
  over_vae = config_of(vae=VAE)
  state = random_state(over_vae)
  assert set(state.frozen) == {"vae"}
  save_states(tmp_path, over_vae, state)
  config, params = loading.load(str(tmp_path))
  assert config.vae.kind == "autoencoder_kl"
  assert_trees_equal(params, {**state.ema, **state.frozen})
  # Reading writes no files.
  assert files_of(workdir) == before
  empty = tmp_path / "empty"
  checkpoint.claim_workdir(str(empty), over_vae)
  fails(f"workdir {empty} has no checkpoint yet", loading.load, str(empty))
  assert [p.name for p in files_of(empty)] == ["config.json"]


def test_kept_checkpoints(config, tmp_path):
  """Keeps the newest two and those at a multiple of ten; a step that already exists is not written again."""
  state = random_state(config)
  states = [state.replace(step=jnp.int32(step)) for step in (5, 10, 15, 20, 20, 25, 30, 35)]
  save_states(tmp_path, config, *states, keep=2, keep_period=10)
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [10, 20, 30, 35]


def steps_with_losses(config, path, *losses, keep=1):
  checkpoints = checkpoint.Checkpoints(str(path), keep=keep)
  for step, loss in losses:
    checkpoints.save(random_state(config, step), loss=loss)
  checkpoints.close()
  return sorted(int(p.name) for p in (path / "checkpoints").iterdir())


def test_a_checkpoint_from_before_a_divergence_is_kept(config, tmp_path):
  """That of the lowest loss; the newest does not count, as nothing shows yet whether training can go on from it."""
  assert steps_with_losses(config, tmp_path, (2, 3.0), (4, 1.0), (6, 1.05), (8, 0.5)) == [4, 8]
  assert steps_with_losses(config, tmp_path, (10, 40.0), (12, 1e9)) == [8, 12]  # also after a restart
  checkpoints = checkpoint.Checkpoints(str(tmp_path))
  assert checkpoints.sane(before=14) == (8, 0.5)
  assert checkpoints.sane(before=9) is None
  (tmp_path / "checkpoints" / "8" / "training" / "metadata").write_text('{"loss": ')
  assert checkpoint.Checkpoints(str(tmp_path)).sane(before=14) == (12, 1e9)


def test_loss_only_parts_are_restored_by_runs_and_skipped_by_loaders(config, tmp_path):
  plain = random_state(config, 5)
  helper, network = {"bias": jnp.arange(3.0)}, {"scale": jnp.ones(2)}
  state = plain.replace(
    params=plain.params | {"helper": helper},
    ema=plain.ema | {"helper": helper},
    frozen=plain.frozen | {"network": network},
  )
  save_states(tmp_path, config, state)
  loaded_config, loaded = loading.load(str(tmp_path))
  assert loaded_config == config
  assert_trees_equal(loaded, plain.ema)
  checkpoints = checkpoint.Checkpoints(str(tmp_path))
  assert_trees_equal(checkpoints.restore(shapes_of(state)), state)
  # A requested part that is missing is an error.
  fails(
    "checkpoint .*/5 cannot be read", orbax.restore_average, str(tmp_path), shapes_of(plain.ema | {"other": helper}), {}
  )
  checkpoints.close()


def harm(folder, how):
  """Damages the arrays of a checkpoint."""
  data = [p for name in ("params", "ema") for p in (folder / name).rglob("d/*") if p.is_file()]
  assert data
  if how == "flipped":  # one bit of an array, which orbax does not notice
    file = max((folder / "ema").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return
  for file in data:
    if how == "truncated":
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "garbled":
      file.write_bytes(bytes(b ^ 85 for b in file.read_bytes()))
    else:
      file.unlink()


@pytest.mark.parametrize("how", ["truncated", "garbled", "missing", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(config, workdir, tmp_path, how, caplog):
  """A warning names it. Loaders use the previous one; a run renames the damaged one and saves that step again."""
  path = tmp_path / "copy"
  shutil.copytree(workdir, path)
  folder = path / "checkpoints" / "5"
  harm(folder, how)
  before, third = files_of(path), random_state(config, 3, seed=3)
  assert_trees_equal(loading.load(str(path))[1], third.ema)
  assert files_of(path) == before
  # (asyncio may log here too, when orbax objects of an earlier case are collected.)
  (warning,) = [r.getMessage() for r in caplog.records if r.name == "absl"]
  assert warning.startswith(f"checkpoint {folder} cannot be read (") and "\n" not in warning

  checkpoints = checkpoint.Checkpoints(str(path), keep=2, own=True)
  assert_trees_equal(checkpoints.restore(shapes_of(third)), third)
  assert checkpoints.latest_step() == 3
  assert {p.name for p in folder.parent.iterdir()} == {"3", "5.unreadable"}
  fifth = random_state(config, 5, seed=7)
  checkpoints.save(fifth)
  checkpoints.close()
  assert_trees_equal(loading.load(str(path))[1], fifth.ema)

  # Damage it again, while the first damaged one is still there; then damage the other one as well.
  harm(folder, how)
  checkpoints = checkpoint.Checkpoints(str(path), own=True)
  assert int(checkpoints.restore(shapes_of(third)).step) == 3
  harm(path / "checkpoints" / "3", how)
  fails(f"checkpoint {path}/checkpoints/3 cannot be read .*, nor any before it", checkpoints.restore, shapes_of(third))
  checkpoints.close()
  fails(f"checkpoint {path}/checkpoints/3 cannot be read", loading.load, str(path))
  assert {p.name for p in folder.parent.iterdir()} == {"3", "5.unreadable"}  # no needless renaming


def test_checkpoints_without_checksums_or_with_damaged_ones_are_not_read(config, workdir, tmp_path):
  shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
  for damage in (Path.unlink, lambda path: path.write_text("{"), lambda path: path.write_text('{"ema": 3}')):
    for path in (tmp_path / "checkpoints").glob("*/checksums.json"):
      damage(path)
    with pytest.raises(ValueError, match="checkpoints/5 cannot be read .no checksums of its files, or damaged ones"):
      orbax.restore_average(str(tmp_path), shapes_of(random_state(config).ema), {})


def test_a_checkpoint_with_parameters_that_are_not_finite_is_refused(config, tmp_path):
  state = random_state(config, 5)
  flat = traverse_util.flatten_dict(state.ema)
  name = sorted(flat)[0]
  save_states(tmp_path, config, state.replace(ema=traverse_util.unflatten_dict({**flat, name: flat[name] * jnp.nan})))
  fails(f"checkpoint .*/5: ema/{'/'.join(name)} has NaN or infinite values", loading.load, str(tmp_path))


def test_partial_checkpoints_of_a_killed_run_are_removed_by_the_next_run(config, workdir, tmp_path):
  path = tmp_path / "copy"
  shutil.copytree(workdir, path)
  half = path / "checkpoints" / "7.orbax-checkpoint-tmp"
  shutil.copytree(path / "checkpoints" / "5", half)
  loading.load(str(path))  # may happen while another run writes
  assert half.exists()
  checkpoints = checkpoint.Checkpoints(str(path), own=True)
  assert checkpoints.latest_step() == 5
  checkpoints.save(random_state(config, 7))
  checkpoints.close()
  assert not half.exists() and (path / "checkpoints" / "7").exists()


@pytest.mark.parametrize("left", [0, 40_000])  # bytes; a checkpoint has some 200,000
def test_a_full_disk_is_a_one_line_error_and_keeps_older_checkpoints(config, small_disk, left, capfd, caplog):
  disk, fill = small_disk
  third, fifth = random_state(config, 3, seed=3), random_state(config, 5, seed=5)
  save_states(disk, config, third)
  fill(left)
  checkpoints = checkpoint.Checkpoints(str(disk), own=True)

  def save():
    checkpoints.save(fifth)
    checkpoints.close()  # raises at the latest

  with pytest.raises(OSError, match=f"checkpoint {disk}/checkpoints/5 cannot be written .*older ones are un") as error:
    save()
  assert "\n" not in str(error.value)
  assert not caplog.text and "Traceback" not in capfd.readouterr().err
  assert_trees_equal(loading.load(str(disk))[1], third.ema)
  (disk / "filler").unlink()
  save_states(disk, config, fifth)
  assert_trees_equal(loading.load(str(disk))[1], fifth.ema)


def test_the_run_that_holds_the_lock_removes_what_killed_exports_left(tmp_path):
  for name in (".weights.safetensors.0123abcd.tmp", ".config.json.0123abcd.tmp", ".mine.tmp"):
    (tmp_path / name).write_bytes(b"half")
  with checkpoint.locked(str(tmp_path)):
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".mine.tmp"]


# Matching workdirs and configs.


def test_a_workdir_belongs_to_one_config(config, tmp_path):
  workdir = str(tmp_path / "a" / "b")
  checkpoint.check_workdir(workdir, config)
  assert not (tmp_path / "a").exists()
  checkpoint.claim_workdir(workdir, config)
  checkpoint.claim_workdir(workdir, config)
  assert read_config(workdir) == config
  text = (tmp_path / "a" / "b" / "config.json").read_text()
  for name, overrides in {
    "seed": dict(seed=1),
    "encoder.width": dict(encoder=dict(width=64)),
    "tokens.levels": dict(tokens=dict(levels=(8, 6, 5))),
    "data.global_batch": dict(data=dict(global_batch=16)),
    "data.sources.synthetic.weight": dict(data=dict(sources=dict(synthetic=dict(weight=0.5)))),
    "optim.learning_rate": dict(optim=dict(learning_rate=2e-3)),
    "stage": dict(stage="vae"),
    "vae.kind": dict(vae=VAE),
  }.items():
    fails(
      rf"workdir {workdir} belongs to another config: .*; use another workdir",
      checkpoint.claim_workdir,
      workdir,
      config_of(**overrides),
    )
    with pytest.raises(ValueError, match=rf"config: {name if name != 'vae.kind' else 'vae.block_out_channels'} is "):
      checkpoint.claim_workdir(workdir, config_of(**overrides))
  assert (tmp_path / "a" / "b" / "config.json").read_text() == text


def test_fields_that_a_workdir_config_lacks_have_their_defaults(config, tmp_path):
  old = config.to_dict()
  del old["tokens"]["corruption"], old["repa"], old["optim"]["discriminator"]["eps"]
  (tmp_path / "config.json").write_text(json.dumps(old), encoding="utf-8-sig")  # as an editor on Windows saves it
  assert read_config(tmp_path) == config
  checkpoint.check_workdir(str(tmp_path), config)


def test_fields_that_a_resumed_run_may_change(config, tmp_path):
  checkpoint.claim_workdir(str(tmp_path), config)
  changed = config_of(
    train=dict(num_steps=999, log_every=1, tensorboard=True),
    eval=dict(sources=("synthetic", "photos"), num_images=9),
    sampler=dict(num_steps=7, guidance="apg"),
    mesh=dict(data=2, fsdp=4),
    remat="full",
    init_from="elsewhere",
    data=dict(num_threads=5, num_workers=2, prefetch=9, max_unreadable=0.5),
  )
  checkpoint.claim_workdir(str(tmp_path), changed)
  assert read_config(str(tmp_path)).train.num_steps == 999


@pytest.mark.parametrize(
  "text, pattern",
  [("", "is not JSON"), ("{", "is not JSON"), ("[]", "does not name a stage"), ("\0\xff", "is not JSON")],
)
def test_damaged_config_of_a_workdir_is_a_one_line_error(config, tmp_path, text, pattern):
  (tmp_path / "config.json").write_text(text, encoding="latin-1")
  fails(rf"{tmp_path}/config.json.*{pattern}", checkpoint.claim_workdir, str(tmp_path), config)
  assert (tmp_path / "config.json").read_text(encoding="latin-1") == text


# One run per workdir.


def test_a_workdir_in_use_is_refused_until_released(config, tmp_path):
  workdir = str(tmp_path / "a" / "b")
  with checkpoint.locked(workdir):
    words = rf"another run \(process {os.getpid()} on .*\) uses {workdir}: stop it, or use another workdir"
    fails(words, checkpoint.locked(workdir).__enter__)
    fails(words, train.train, config, workdir)
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == [".lock"]
  with checkpoint.locked(workdir):
    pass


def test_a_pipe_in_place_of_the_lock_is_refused(tmp_path):
  os.mkfifo(tmp_path / ".lock")
  fails("lock is not a regular file: delete it", checkpoint.locked(str(tmp_path)).__enter__)


def test_a_killed_run_leaves_no_lock(tmp_path):
  with checkpoint.locked(str(tmp_path)):
    pass
  code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
  command = [sys.executable, "-c", code, tmp_path / ".lock"]
  other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  other.stdout.readline()
  fails("another run", checkpoint.locked(str(tmp_path)).__enter__)
  other.kill()
  other.communicate()
  with checkpoint.locked(str(tmp_path)):
    pass


def test_file_systems_without_locks_give_a_warning(tmp_path, monkeypatch, caplog):
  def unsupported(*args):
    raise OSError(errno.ENOTSUP, "Operation not supported")

  monkeypatch.setattr(checkpoint.files.fcntl, "flock", unsupported)
  with checkpoint.locked(str(tmp_path)):
    assert "cannot be locked here" in caplog.text
