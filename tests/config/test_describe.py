"""Configs as text: every field once, with its value, its comment and its default."""

import ast

from flextok_jax import config as common
from flextok_jax.config.ranges import flat


def parse(text):
  fields = (line.partition(" = ") for line in text.splitlines() if line and not line.startswith("#"))
  return {name: ast.literal_eval(value) for name, _, value in fields}  # comments beside values are ignored


def test_every_field_is_listed_once_with_its_value():
  config = common.load_config("shapes:grid")
  text = common.describe(config)
  assert parse(text) == flat(config)
  assert max(map(len, text.splitlines())) <= 120
  assert parse(common.describe(common.get_config())) == flat(common.get_config())


def test_comments_and_defaults():
  lines = common.describe(common.derive(encoder=dict(width=128), optim=dict(name="muon"))).splitlines()
  assert "encoder.width = 128  # default: 768; 64 * depth [paper]" in lines
  assert "decoder.mlp_bias = False" in lines and "optim.eps = 1e-08" in lines
  i = lines.index("optim.name = 'muon'")
  assert lines[i - 1].startswith("# default: 'adamw'; or \"muon\": the blocks' matrices by Muon")
  i = lines.index("data.tokens = ''  # of stage \"ar\": a folder that python -m flextok_jax.tokenize --config wrote")
  assert lines[i + 1].startswith('# Of stages "tokenizer" and "distill": a folder')
  assert sum("#" in line for line in lines) > 150
