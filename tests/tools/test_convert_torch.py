"""Converting PyTorch files to safetensors: what works without PyTorch, and the rest if it is installed."""

import sys

from absl import flags
import numpy as np
import pytest
from safetensors.numpy import load_file

from flextok_jax import convert
from flextok_jax.tools import convert_torch


class Tensor:
  """The parts of a PyTorch tensor that finding names needs."""

  def __init__(self, floating=True):
    self.floating = floating

  def is_floating_point(self):
    return self.floating


def test_names():
  one, two, count = Tensor(), Tensor(), Tensor(False)
  layer = {"a.weight": one, "b": {"bias": two}, "a.steps": count}
  names = {"a.weight": one, "b.bias": two}
  assert convert_torch.flatten(layer) == (names, ["a.steps"])
  for sole in ({"state_dict": layer}, {"model": {"state_dict": layer}, "epoch": 3, "options": {"lr": 0.1}}):
    assert convert_torch.flatten(sole) == (names, ["a.steps"])
  both, others = convert_torch.flatten({"model": layer, "ema": {"w": one}, "epoch": 3})
  assert both == {"model.a.weight": one, "model.b.bias": two, "ema.w": one} and others == ["model.a.steps", "epoch"]
  assert convert_torch.flatten({}) == ({}, [])


def test_without_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "x.pth").write_bytes(b"")
  with pytest.raises(ImportError, match=r"x.pth needs torch: pip install 'flextok-jax\[eval\]'") as error:
    convert_torch.convert(f"{tmp_path}/x.pth", f"{tmp_path}/x.safetensors")
  assert "\n" not in str(error.value)


def test_bad_targets_and_sources(tmp_path):
  with pytest.raises(ValueError, match="x.npz must end with .safetensors"):
    convert_torch.convert("x.pth", "x.npz")
  with pytest.raises(FileNotFoundError, match="no such file: x.pth"):
    convert_torch.convert("x.pth", f"{tmp_path}/x.safetensors")
  (tmp_path / "x.safetensors").write_bytes(b"")
  with pytest.raises(ValueError, match="already exists"):
    convert_torch.convert("x.pth", f"{tmp_path}/x.safetensors")


@pytest.fixture
def torch():
  return pytest.importorskip("torch", reason="torch is not installed: its files can be neither written nor read")


def test_tensors_are_unchanged(torch, tmp_path, capsys):
  numbers = torch.arange(6.0).reshape(2, 3)
  values = dict(
    half=numbers.half(),
    brain=numbers.bfloat16(),
    double=numbers.double(),
    turned=numbers.T,
    trained=torch.nn.Parameter(numbers),
    same=numbers,
    count=torch.tensor(3),
  )
  torch.save({"state_dict": values, "epoch": 1}, tmp_path / "x.pth")
  values_of = flags.FlagValues()
  convert.define_flags(values_of)
  values_of(["convert", "--check"])
  with pytest.raises(ValueError, match="--check has no meaning for a PyTorch file"):
    convert.main(f"{tmp_path}/x.pth", f"{tmp_path}/x.safetensors", values_of)
  values_of.unparse_flags()
  values_of["check"].unparse()
  values_of(["convert"])
  convert.main(f"{tmp_path}/x.pth", f"{tmp_path}/x.safetensors", values_of)
  assert "wrote 6 tensors to" in capsys.readouterr().out
  found = load_file(tmp_path / "x.safetensors")
  assert found.keys() == values.keys() - {"count"}
  for name, x in found.items():
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, numbers.T if name == "turned" else numbers)


class Harmful:
  """An object that runs a function when it is unpickled."""

  def __reduce__(self):
    return (print, ("unpickled",))


def test_refused_files(torch, tmp_path, capsys):
  torch.save({"a": Harmful()}, tmp_path / "harmful.pth")
  torch.save([torch.zeros(3)], tmp_path / "list.pth")
  torch.save({"a": torch.tensor(1)}, tmp_path / "count.pth")
  (tmp_path / "cut.pth").write_bytes((tmp_path / "list.pth").read_bytes()[:200])
  (tmp_path / "empty.pth").write_bytes(b"")
  for name, words in (
    ("harmful", "not a whole PyTorch file of tensors alone"),
    ("list", "no dictionary of tensors"),
    ("count", "no tensor of floating-point"),
    ("cut", "not a whole"),
    ("empty", "not a whole"),
  ):
    with pytest.raises(ValueError, match=words) as error:
      convert_torch.convert(f"{tmp_path}/{name}.pth", f"{tmp_path}/x.safetensors")
    assert "\n" not in str(error.value)
  assert capsys.readouterr().out == "" and not (tmp_path / "x.safetensors").exists()
