"""What commands share: Ctrl-C, and devices that cannot start."""

import importlib

import jax
import pytest

import flextok_jax
from flextok_jax import benchmark, convert, evaluate
from flextok_jax.core import accelerators
from flextok_jax.tools import loader
from tests.support import numpy_ar
from tests.support.commands import fails, shell


@pytest.mark.parametrize("where, count", [("python", 1), ("flags", 1), ("ignored", 1), ("jax", 2)])
def test_ctrl_c_is_one_line_and_exit_code_130(where, count):
  """One signal between computations, or two during a computation that does not end."""
  code, printed, err = shell("tests.support.interrupted", where, count)
  assert (code, printed) == (130, ""), err
  assert err in ("stopped by Ctrl-C\n", "stopped by Ctrl-C\n" * count), err


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
  folder = tmp_path_factory.mktemp("gen")
  numpy_ar.tiny_generator(condition="none", depth=1).save(folder)
  return folder


@pytest.mark.parametrize("platform", ["cuda", "gpu", "tpu", "nonsense"])
def test_devices_that_cannot_start_are_one_line(generator, tmp_path, platform):
  """Also where loading would call the weights' config bad; nothing is written."""
  flags = [f"--checkpoint={generator}", f"--tokenizer={generator}", f"--out={tmp_path / 'out'}"]
  code, printed, err = shell("tests.support.on_platform", platform, "flextok_jax.sample", *flags)
  assert (code, printed) == (1, "") and len(err.splitlines()) == 1, err
  assert err.startswith(f"error: JAX_PLATFORMS={platform}: JAX cannot start its devices") and "=cpu" in err
  assert not (tmp_path / "out").exists()


def test_training_on_devices_that_cannot_start_is_one_line(tmp_path):
  flags = ["--config=debug", f"--workdir={tmp_path / 'run'}"]
  code, printed, err = shell("tests.support.on_platform", "cuda", "flextok_jax.train", *flags)
  assert code == 1 and err.startswith("error: JAX_PLATFORMS=cuda: ") and len(err.splitlines()) == 1, (printed, err)


def test_loading_asks_for_devices_first(generator, monkeypatch):
  def missing():
    raise RuntimeError("Unable to initialize backend 'cuda'\nand more")

  monkeypatch.setattr(jax, "devices", missing)
  for load in (flextok_jax.load, flextok_jax.load_ar):
    with pytest.raises(OSError, match=r"cannot start its devices \(Unable to initialize backend 'cuda'\)"):
      load(generator)


OUTPUTS = {  # by command: the other flags it needs, all of which are looked at later
  "benchmark": ("--config=debug",),
  "compile": ("--config=debug", "--topology=v5e:2x2"),
  "detokenize": ("--checkpoint=/absent", "--tokens=/absent.json"),
  "evaluate": ("--checkpoint=/absent",),
  "export": ("--checkpoint=/absent", "--what=tokenize"),
  "mup_check": ("--config=debug",),
  "sample": ("--checkpoint=/absent", "--tokenizer=/absent"),
  "study": ("--checkpoint=/absent",),
  "sweep": ("--dir=/absent",),
  "tokenize": ("--checkpoint=/absent", "--images=/absent"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_first(name, tmp_path, monkeypatch):
  command = importlib.import_module(f"flextok_jax.{name}")
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "file").touch()
  for out in ("~/file/out.json", f"{tmp_path}/file/out.json"):
    fails(f"cannot write {tmp_path}/file.*: .*file is a file", command, *OUTPUTS[name], f"--out={out}")
  fails("--out='s3://x/out.json' cannot be used", command, *OUTPUTS[name], "--out=s3://x/out.json")
  if name != "evaluate":  # writes there
    fails("--out=gs://x/out.json is in a bucket", command, *OUTPUTS[name], "--out=gs://x/out.json")


def test_other_outputs_that_cannot_be_written_are_refused_first(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "file").touch()
  refused = f"cannot write {tmp_path}/file: it is a file|cannot write {tmp_path}/file: {tmp_path}/file is a file"
  given = ("--save_reference=~/file/x.npz", "--reference=/absent", "--weights=/absent")
  fails(refused, evaluate, *given)
  samples = ("--checkpoint=/absent", "--tokenizer=/absent", "--metrics=gfid", f"--out={tmp_path / 'out'}")
  fails(refused, evaluate, *given, *samples)
  for target in ("~/file/x", "~/file/x.safetensors"):
    with pytest.raises(ValueError, match=refused):
      convert.main("/absent", target, None)


def test_the_loader_benchmark_starts_devices_before_its_rounds(monkeypatch):
  def missing():
    raise ValueError("JAX cannot start its devices")

  monkeypatch.setattr(accelerators, "start", missing)
  monkeypatch.setattr(loader, "write_photographs", None)
  fails("cannot start its devices", benchmark, "--config=loader", "--jobs=loader")
