"""A small tokenizer's configuration in our form and in the official one, used by tests of both."""

import copy
import functools

import pytest

from flextok_jax.weights.official.tokenizer import from_official
from flextok_jax.weights.official.writer import to_official

HALF = dict(
  depth=2,
  head_dim=16,
  patch_size=2,
  mlp_ratio=4.0,
  gated_mlp=True,
  activation="silu",
  qk_norm=True,
  qkv_bias=False,
  out_bias=False,
  mlp_bias=False,
  posemb="sincos",
  posemb_scaling="absolute",
  max_grid=8,
  max_grid_width=0,
  head_bias=True,
  readout_multiplier=1.0,
)
OURS = dict(
  stage="tokenizer",
  seed=0,
  image_size=0,
  dtype="float32",
  remat="none",
  init_from="",
  vae=dict(
    kind="autoencoder_kl", latent_channels=8, scaling_factor=0.5, sample_posterior=False, dtype="float32", hub_id=None
  ),
  encoder=dict(HALF, width=32),
  decoder=dict(
    HALF,
    width=48,
    modulation="per_segment",
    head_modulation=True,
    head_modulation_bias=True,
    code_bias=True,
    max_timestep=1.0,
    null_condition="learned",
  ),
  tokens=dict(
    layout="registers",
    num_registers=16,
    levels=(8, 6, 5),
    nested_dropout="pow2",
    mask="token",
    saturation_weight=0.0,
    null_prob=0.1,
  ),
  flow=dict(t_sampling="mode", mode_scale=0.25, t_shift=1.0, base_size=0),
  sampler=dict(num_steps=25, guidance="apg", guidance_scale=7.5, apg_momentum=-0.5, apg_eta=0.0, apg_threshold=2.5),
)
DELETE = "<delete>"  # removes an entry
E = "encoder.module_dict."
D = "decoder.module_dict."
CODE = "__import__('os').system('x')"
NO_LITERALS = [
  CODE,
  f"{{'a': {CODE}}}",
  "open('x')",
  "lambda: 0",
  "{'a': 1",
  "",
  "(",
  "a.b",
  "{1, 2}",
  "b'x'",
  "f'{x}'",
  "1 + 1",
  "'a'.upper()",
  "[x for x in y]",
  "9" * 5000,
  "-" * 100_000 + "1",
  "1" + "+1" * 100_000,
  "[" * 1000 + "]" * 1000,
  "[" * 400_000,
  '{"a":' * 50_000,
  "'" + "\\" * 100_001,
  "'\\N{BULLET}'",
  "'\0'",
  "'\ud800'x",
  "x" * 2_000_000,
  "[1," * 200_000,
  "[" + "0," * 100_000 + "]",
  "{'a': nan}",
  '{"a": NaN}',
  "\x0c",
  "'\r'",
  "{'a': ...}",
  "1_0_",
  "{[]: 1}",
  "{{}: 1}",
  "'\\U00110000'",
  "0777",
  "1j",
]  # texts that are not the repr() of plain data
DEEP = functools.reduce(lambda inner, _: [inner], range(100), 1)


def put(config, path, value):
  """Sets, adds or removes (DELETE) the entry at a dotted path, in place; returns the config."""
  *parents, name = path.split(".")
  for part in parents:
    config = config[part]
  if value is DELETE:
    del config[name]
  else:
    config[name] = value
  return config


def ours(**changes):
  """Returns OURS with changed entries; a double underscore stands for the dot of a path."""
  config = copy.deepcopy(OURS)
  for path, value in changes.items():
    put(config, path.replace("__", "."), value)
  return config


def official(changes=()):
  """Returns the official form of OURS with changes {path: value}."""
  config = to_official(OURS)
  for path, value in dict(changes).items():
    put(config, path, value if value is DELETE else copy.deepcopy(value))
  return config


def settings(config, **kwargs):
  return from_official(config, **kwargs)[0]


def metadata_of(config):
  return {name: str(value) for name, value in config.items()}


def refused(pattern, call, *args):
  """Asserts that a call raises a one-line error that matches."""
  with pytest.raises(ValueError, match=pattern) as error:
    call(*args)
  line = str(error.value)
  assert line and len(line.splitlines()) == 1 and len(line) < 700, line
