"""Five hundred damaged files: each raises one clear line of our own, and no code in them runs."""

import ast
import json
from pathlib import Path
import random
import struct
import traceback

import jax
import numpy as np
import pytest

from flextok_jax.weights import loading, saving
from tests.support import weights_mutants

NUMBER = 500
PACKAGE = str(Path(loading.__file__).parents[1])


@pytest.fixture(scope="module")
def official(tmp_path_factory):
  """(header, data) of an undamaged official file with random weights."""
  path = tmp_path_factory.mktemp("official") / "model.safetensors"
  saving.save_official(path, *weights_mutants.tiny_tokenizer())
  blob = path.read_bytes()
  end = 8 + int.from_bytes(blob[:8], "little")
  assert load(path) is None  # undamaged
  return json.loads(blob[8:end]), blob[end:]


def load(path):
  """Returns the error raised by loading, or None."""
  try:
    config, params = loading.load(path, vae_norm_num_groups=2)
  except Exception as e:
    return e
  jax.block_until_ready(params)
  return None


def assemble(header, data):
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


def tensor_names(header):
  return [name for name in header if name != "__metadata__"]


# Kinds of damage: (header, data, rng, canary) -> bytes. They may modify the header in place.


def truncated(header, data, rng, canary):
  whole = assemble(header, data)
  return whole[: rng.integers(len(whole))]


def truncated_header(header, data, rng, canary):
  whole = assemble(header, data)
  return whole[: rng.integers(len(whole) - len(data))]


def lying_length(header, data, rng, canary):
  whole = assemble(header, data)
  length = len(whole) - len(data) - 8
  little = int(rng.integers(1, 99))
  lies = [0, 1, length - little, length + little, len(whole), 2**40, 2**63, 2**64 - 1]
  return struct.pack("<Q", lies[rng.integers(len(lies))]) + whole[8:]


def wrong_dtype(header, data, rng, canary):
  name = rng.choice(tensor_names(header))
  header[name]["dtype"] = str(rng.choice(["I32", "U32", "F64", "F16", "BF16", "BOOL", "F8_E4M3", "C64", "X", ""]))
  return assemble(header, data)


def integers(header, data, rng, canary):
  """Gives all tensors of one size an integer type; the file is well-formed."""
  for name in rng.choice(tensor_names(header), 3):
    header[name]["dtype"] = "I32"
  return assemble(header, data)


def wrong_offsets(header, data, rng, canary):
  name = rng.choice(tensor_names(header))
  begin, end = header[name]["data_offsets"]
  shift = int(rng.integers(1, 2**40))
  header[name]["data_offsets"] = [[begin + shift, end + shift], [end, begin], [-begin - 1, end], [begin, end + 4]][
    rng.integers(4)
  ]
  return assemble(header, data)


def missing(header, data, rng, canary):
  """Omits one tensor and adjusts later offsets, so that the file is well-formed."""
  name = rng.choice(tensor_names(header))
  begin, end = header.pop(name)["data_offsets"]
  for name in tensor_names(header):
    first, last = header[name]["data_offsets"]
    if first >= end:
      header[name]["data_offsets"] = [first - (end - begin), last - (end - begin)]
  return assemble(header, data[:begin] + data[end:])


def extra(header, data, rng, canary):
  name = ["decoder.more", "vae.vae.encoder.down_blocks.7.resnets.0.conv1.weight", "../../x", "a" * 5000, "", "\n"][
    rng.integers(6)
  ]
  header[name] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [len(data), len(data) + 24]}
  return assemble(header, data + bytes(24))


def renamed(header, data, rng, canary):
  name = str(rng.choice(tensor_names(header)))
  other = [name.upper(), name + ".weight", name[1:], name.replace("0", "9"), "__import__('os').system('x')"]
  other = [o for o in other if o != name]
  header[other[rng.integers(len(other))]] = header.pop(name)
  return assemble(header, data)


def reshaped(header, data, rng, canary):
  while True:
    tensor = header[str(rng.choice(tensor_names(header)))]
    shape = tensor["shape"]
    other = [[*shape, 1], [int(np.prod(shape))], shape[::-1], [1, *shape]][rng.integers(4)]
    if other != shape:
      tensor["shape"] = other
      return assemble(header, data)


def swapped_shapes(header, data, rng, canary):
  header[str(rng.choice(tensor_names(header)))]["shape"] = [[2**62, 4], [-1], [2**70], ["a"], "abc", [[]], None][
    rng.integers(7)
  ]
  return assemble(header, data)


def absurd_metadata(header, data, rng, canary):
  metadata = header["__metadata__"]
  junk = [
    "",
    "None",
    "[]",
    "{",
    "(" * 3000,
    "[" * 200_000,
    "9" * 10_000,
    "{'_target_': 1}",
    "nan",
    "\0",
    "é" * 99,
    "{" * 60 + "}" * 60,
    "'" + "a" * 2_000_000 + "'",
    "{1: 2}",
    "-" * 99_999 + "1",
    "0x" + "f" * 9999,
    "...",
    "{'a': {'a': {'a': 1e999}}}",
    '"unterminated',
    "b'bytes'",
    "{'module_dict': {}}",
    "lambda: 0",
  ]
  metadata[str(rng.choice(["vae", "encoder", "decoder", "regularizer", "pipeline"]))] = junk[rng.integers(len(junk))]
  return assemble(header, data)


def absurd_values(header, data, rng, canary):
  """Changes one number, name or switch of the config."""
  metadata = header["__metadata__"]
  part = str(rng.choice(["encoder", "decoder"]))
  config = ast.literal_eval(metadata[part])
  leaves = [
    (module, key)
    for module in config["module_dict"].values()
    for key, value in module.items()
    if not isinstance(value, dict) and "key" not in key
  ]
  module, key = leaves[rng.integers(len(leaves))]
  values = [-1, 0, 10**30, -(2**63), 1.5, "x" * 9999, [], [[[]]], {"a": 1}, None, 2**31, {"_target_": "os.system"}]
  module[key] = values[rng.integers(len(values))]
  metadata[part] = str(config)
  return assemble(header, data)


def missing_metadata(header, data, rng, canary):
  metadata = header["__metadata__"]
  del metadata[str(rng.choice(["vae", "encoder", "decoder", "regularizer", "pipeline", "flow_matching_noise_module"]))]
  if rng.random() < 0.3:
    header["__metadata__"] = [None, {}, {"format": "pt"}, "x", {"encoder": 1}, []][rng.integers(6)]
  return assemble(header, data)


def code(header, data, rng, canary):
  metadata = header["__metadata__"]
  call = f"__import__('pathlib').Path({str(canary)!r}).touch()"
  config = ast.literal_eval(metadata["encoder"])
  module = list(config["module_dict"].values())[rng.integers(len(config["module_dict"]))]
  kind = rng.integers(6)
  if kind == 0:
    metadata["encoder"] = call
  elif kind == 1:
    metadata["encoder"] = "{'module_dict': {'a': " + call + "}}"
  elif kind == 2:
    module["_target_"] = "pathlib.Path.touch"
    module["self"] = str(canary)
  elif kind == 3:
    module.update(_target_="builtins.eval", _args_=[call])
  elif kind == 4:
    config = {"_target_": "os.system", "command": f"touch {canary}"}
  else:
    module["dim"] = {"_target_": "subprocess.run", "args": ["touch", str(canary)]}
  if kind > 1:
    metadata["encoder"] = str(config)
  if rng.random() < 0.3:
    metadata["_target_"] = "os.system"
  return assemble(header, data)


def garbage(header, data, rng, canary):
  first = [b"", b"\0" * 100, b"PK\3\4", b"\x80\x04\x95", b"\x89HDF", b"<html>", b"version https://git-lfs"][
    rng.integers(7)
  ]
  return first + rng.bytes(rng.integers(3000))


DAMAGES = [
  truncated,
  truncated_header,
  lying_length,
  wrong_dtype,
  integers,
  wrong_offsets,
  missing,
  extra,
  renamed,
  reshaped,
  swapped_shapes,
  absurd_metadata,
  absurd_values,
  missing_metadata,
  code,
  garbage,
]


def assert_clear(error, path):
  """Asserts that the error is one short line, raised deliberately by our own code."""
  assert isinstance(error, ValueError), repr(error)
  assert "\n" not in str(error) and len(str(error)) < 700 and str(error).startswith(str(path)), str(error)
  assert traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE), traceback.format_exception(error)


def test_five_hundred_damaged_files(official, tmp_path):
  rng = np.random.default_rng(500)
  path, canary = tmp_path / "model.safetensors", tmp_path / "canary"
  lines = set()
  for i in range(NUMBER):
    damage = DAMAGES[i % len(DAMAGES)]
    blob = damage(json.loads(json.dumps(official[0])), official[1], rng, canary)
    path.write_bytes(blob)
    error = load(path)
    if error is None and damage is absurd_values:
      continue  # the model does not depend on that value
    assert error is not None, (i, damage.__name__)
    assert_clear(error, path)
    assert not canary.exists(), damage.__name__
    lines.add(str(error))
  assert len(lines) > 200  # messages distinguish the damages


def test_flipped_bytes_in_the_header(official, tmp_path):
  """Such a file may still be valid (a space, an unused name); otherwise it raises one clear line too."""
  rng = np.random.default_rng(1)
  whole = assemble(*official)
  end = len(whole) - len(official[1])
  path = tmp_path / "model.safetensors"
  failed = 0
  for _ in range(100):
    blob = bytearray(whole)
    for position in rng.integers(8, end, rng.integers(1, 4)):
      blob[position] ^= 1 << rng.integers(8)
    path.write_bytes(blob)
    error = load(path)
    if error is not None:
      assert_clear(error, path)
      failed += 1
  assert failed > 50


@pytest.mark.parametrize(
  "text",
  [
    "",
    "[]",
    "{",
    "null",
    '{"a": 1}',
    "[" * 100_000,
    '{"encoder": NaN}',
    "\xff\xfe",
    '{"_class_name": "AutoencoderKL", "block_out_channels": "os"}',
  ],
)
def test_damaged_hub_configs(official, tmp_path, text):
  (tmp_path / "model.safetensors").write_bytes(assemble(*official))
  (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
  assert_clear(load(tmp_path), tmp_path)


@pytest.mark.parametrize(
  "kind, count", [("safetensors", 60), ("hub_config", 30), ("tokenizer_json", 100), ("orbax_items", 8)]
)
def test_mutants_are_read_or_refused_in_one_line(kind, count, tmp_path):
  """Long runs: experiments/mutants.py."""
  for number in range(count):
    folder = tmp_path / str(number)
    folder.mkdir()
    try:
      getattr(weights_mutants, kind)(random.Random(number), folder)
    except (ValueError, FileNotFoundError) as e:
      assert len(str(e).splitlines()) == 1 and len(str(e)) < 1000, e
