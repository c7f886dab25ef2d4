"""The convert command on tokenizers."""

from pathlib import Path
import subprocess

import jax
from PIL import Image
import pytest
import safetensors
from safetensors.numpy import load_file

from flextok_jax.inference import tokenizer as api
from flextok_jax.weights import saving
from tests.support.commands import shell
from tests.support.random_tokenizer import GROUPS, random_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
  return random_model()


def convert(*args):
  return subprocess.CompletedProcess(args, *shell("flextok_jax.convert", *args))


def test_convert_round_trip(model, tmp_path):
  model.to_official(tmp_path / "a.safetensors")
  groups = f"--vae_norm_num_groups={GROUPS}"
  done = convert(tmp_path / "a.safetensors", tmp_path / "ours", groups, "--check")
  assert done.returncode == 0, done.stderr
  total = sum(x.size for x in jax.tree.leaves(model.params))
  assert f"{total:,}" in done.stdout and "decoder transformer" in done.stdout and "float32" in done.stdout
  assert "all 6 tokens equal" in done.stdout
  picture = Image.open(tmp_path / "ours_check.png")
  assert picture.size == (64, 32)
  done = convert(tmp_path / "ours", tmp_path / "b.safetensors", "--check", groups)
  assert done.returncode == 0 and "official format" in done.stdout, done.stderr
  a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
  assert set(a) == set(b) and all(a[k].tobytes() == b[k].tobytes() for k in a)
  first, second = (safetensors.safe_open(tmp_path / f"{x}.safetensors", "numpy").metadata() for x in "ab")
  assert first == second


def test_convert_errors_are_one_line(model, tmp_path):
  model.save(tmp_path / "ours")
  for args, pattern in (
    ((tmp_path / "absent", tmp_path / "x"), "no such checkpoint"),
    ((tmp_path / "ours", tmp_path / "ours"), "exists: remove it"),
    ((tmp_path / "ours",), "DST is missing: the arguments are SRC DST"),
    ((tmp_path / "ours", "a", "b"), "unexpected argument 'b'"),
    ((tmp_path / "ours", tmp_path / "x", "--dtype=int32"), "dtype must be one of"),
  ):
    done = convert(*args)
    assert done.returncode == 1 and done.stdout == "", done.stdout
    assert done.stderr.count("\n") == 1 and pattern in done.stderr, done.stderr
  assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_check_detects_a_bad_conversion(model, tmp_path, monkeypatch):
  """--check fails if the writer changes the weights."""
  from absl import flags

  from flextok_jax import convert as command

  values = flags.FlagValues()
  command.define_flags(values)
  values(["convert", "--check", f"--vae_norm_num_groups={GROUPS}"])
  model.save(tmp_path / "ours")
  spoil = lambda self, path: saving.save_official(path, self.config, jax.tree.map(lambda x: 1.5 * x, self.params))
  monkeypatch.setattr(api.FlexTok, "to_official", spoil)
  with pytest.raises(ValueError, match="does not encode like its source"):
    command.main(str(tmp_path / "ours"), str(tmp_path / "b.safetensors"), values)
