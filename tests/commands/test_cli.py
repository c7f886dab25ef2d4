"""What commands share: Ctrl-C, and devices that cannot start."""

import jax
import pytest

import flextok_jax
from tests.support import numpy_ar
from tests.support.commands import shell


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
