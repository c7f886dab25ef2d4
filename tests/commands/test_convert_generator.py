"""The convert command on generators in the released format."""

from absl import flags
import jax
import numpy as np
import optax
import pytest

import flextok_jax
from flextok_jax import convert
from tests.support.official_generator_files import tensors, write


def run(source, target, *args):
  values = flags.FlagValues()
  convert.define_flags(values)
  values(["convert", *args])
  convert.main(str(source), str(target), values)


@pytest.mark.parametrize("name", ["class", "text"])
def test_convert_released_generators(name, tmp_path, capsys):
  params, official = tensors(name)
  source = write(tmp_path / "official.safetensors", official)
  for target, dtype in ((tmp_path / "ours", "float32"), (tmp_path / "ours.safetensors", "bfloat16")):
    run(source, target, "--generator", "--check", f"--dtype={dtype}")
    gen = flextok_jax.load_ar(target, "float32")
    rounded = jax.tree.map(np.float32, optax.tree.cast(params, dtype))
    assert jax.tree.all(jax.tree.map(np.array_equal, gen.params, rounded))
  printed = capsys.readouterr().out
  assert printed.count("logits of 8 random ids are equal") == 2 and "ar blocks" in printed


def test_incompatible_files_are_one_line_errors(tmp_path):
  source = write(tmp_path / "official.safetensors", tensors("class")[1])
  for pattern, args in (
    ("holds a generator: load it by flextok_jax.load_ar", ()),
    ("--setting=dim=16 is of generators", ("--setting=dim=16",)),
    ("dim is 32 in the settings, but 16 in the weights", ("--generator", "--setting=dim=32")),
    ("must be name=value", ("--generator", "--setting=dim")),
    ("generators are only written in our format", ("--generator", "--to=official")),
    ("--image_size is of tokenizers", ("--generator", "--image_size=64")),
  ):
    with pytest.raises(ValueError, match=pattern) as caught:
      run(source, tmp_path / "ours", *args)
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "ours").exists()
