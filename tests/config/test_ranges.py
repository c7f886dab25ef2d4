"""The ranges of fields: bad values of every field are refused in one line that names the range."""

import json
import os
import random

import pytest

from flextok_jax import config as common
from flextok_jax.config import ranges
from flextok_jax.data.sources.registry import SOURCES
from flextok_jax.models import layers
from flextok_jax.ops import attention, flow, guidance, nested
from flextok_jax.stages import make_stage
from tests.support import config_mutants

NAN, INF = float("nan"), float("inf")
BAD = {  # field: values that were accepted, or found only after work was done
  "seed": (-1, 2**32, 99999999999999999999, True, 1.0),
  "image_size": (0, 1_000_000, "256"),
  "dtype": ("float64", "int8", "float31", 32),
  "profile_steps": ((3,), (5, 5), (0, 2), (1, 2, 3), ("a", "b")),
  "vae.block_out_channels": ((), (0,), (8,) * 9, 128),
  "vae.scaling_factor": (-1.0, NAN, INF),
  "encoder.width": (0, 10**9, 64.0),
  "decoder.depth": (10**6,),
  "tokens.levels": ((), (1,), (2**16, 2**16), (8, 8.5), ("a",)),
  "sampler.num_steps": (0, 100_000_000),
  "sampler.guidance_scale": (-1.0, NAN),
  "sampler.guidance_interval": ((1.0, 0.0), (0.0,), (0.0, 1.5), (NAN, 1.0), 0.5),
  "ar.guidance_scale": (-3.0,),
  "ar.temperature": (0.0, -1.0, NAN, 1e-38),
  "ar.top_p": (1.5,),
  "data.num_threads": (0, -1),
  "data.num_workers": (-1,),
  "data.prefetch": (-1,),
  "data.max_unreadable": (NAN, -0.1, 1.1),
  "data.sources.synthetic.weight": (INF, NAN, -1.0, "much"),
  "optim.learning_rate": (0.0, NAN, 10**400),
  "optim.b2": (1.0,),
  "train.keep_period": (-1,),
  "train.export_dtype": ("float64", "float8_e4m3fn", ""),
  "eval.num_tokens": (("a",), (0,), 8),
  "eval.sources": (("mars",), "synthetic"),
  "mesh.tensor": (0, -2),
  "fast": (1, "yes", None),
  "init_from": (7, "x" * 5000),
}


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range(name):
  for value in BAD[name]:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got ") as error:
      common.with_fields(common.derive(), {name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_every_number_has_a_range():
  """Only switches and texts may be without one. The values of the defaults are in their ranges."""
  fields = ranges.flat(common.derive())
  common.check(common.derive())
  assert ranges.RANGES.keys() <= fields.keys()
  assert {type(fields[name]) for name in fields.keys() - ranges.RANGES.keys()} == {bool, str}


def test_names_are_those_of_the_code():
  for name, known in {
    "attention": attention.IMPLEMENTATIONS,
    "remat": layers.REMATS,
    "encoder.activation": layers.ACTIVATIONS,
    "ar.norm": layers.NORMS,
    "tokens.nested_dropout": nested.MODES,
    "flow.t_sampling": flow.T_SAMPLINGS,
    "sampler.guidance": guidance.MODES,
  }.items():
    assert set(ranges.RANGES[name].words.removeprefix("one of ").split(", ")) == set(known)
  assert set(SOURCES) == set(common.derive().data.sources)


def test_configs_of_other_shapes_are_refused():
  """A config file may return any ConfigDict."""
  config = common.derive()
  with config.unlocked():
    del config.sampler["num_steps"]
  with pytest.raises(ValueError, match="the field sampler.num_steps is missing"):
    make_stage(config)
  with config.unlocked():
    config.sampler = None
  with pytest.raises(ValueError, match="sampler must be a group of fields, got None"):
    make_stage(config)
  with pytest.raises(ValueError, match="unknown field 'optim.lr'"):
    common.with_fields(common.derive(), {"optim.lr": 1.0})


# Configs in files.


def test_missing_fields_have_their_defaults():
  config = common.derive(seed=3, sampler=dict(num_steps=7), eval=dict(num_tokens=(1, 4)))
  values = config.to_dict()
  del values["repa"], values["sampler"]["guidance"], values["data"]["sources"]["emoji"]
  assert common.parse_config(json.dumps(values), "a file") == config
  assert common.parse_config('{"stage": "ar", "optim": {"clip_norm": 1}}', "a file").optim.clip_norm == 1.0


@pytest.mark.parametrize(
  "text, words",
  [
    ("{", "is not JSON"),
    ('{"a":' * 100_000, "is not JSON"),
    ('{"stage": "ar", "seed": ' + "9" * 5000 + "}", "is not JSON"),
    (" " * 1_000_001, "is not JSON: more than 1000000 characters"),
    ("[1]", "does not name a stage"),
    ('{"stage": []}', "stage must be one of tokenizer, vae, ar, distill, got "),
    ('{"stage": "ar", "seed": {"a": 1}}', "unknown field 'seed.a'"),
    ('{"stage": "ar", "seed": null}', "seed must be a whole number .*, got None"),
    ('{"stage": "ar", "encoder": 5}', "encoder must be a group of fields, got 5"),
    ('{"stage": "ar", "encoder": []}', "encoder must be a group of fields, got "),
    ('{"stage": "ar", "": 1}', "unknown field ''"),
    ('{"stage": "ar", "optim": {"b1": NaN}}', "optim.b1 must be .*, got nan"),
    ('{"stage": "ar", "eval": {"num_tokens": [[1]]}}', "eval.num_tokens must be "),
    ('{"stage": "ar", "sampler": {"guidance_interval": [1, 0]}}', "sampler.guidance_interval must be two times"),
    ('{"stage": "ar", "ar": {"temperature": "hot"}}', "ar.temperature must be .*, got 'hot'"),
    ('{"stage": "ar", "\\ud800\\n": 1}', "unknown field .*ud800"),
  ],
)
def test_bad_configs_in_files(text, words):
  with pytest.raises(ValueError, match=f"^the config in a file.*{words}") as error:
    common.parse_config(text, "a file")
  assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_pipe_is_no_config(tmp_path):
  os.mkfifo(tmp_path / "config.json")
  with pytest.raises(FileNotFoundError, match="has no config.json"):
    common.read_config(tmp_path)


@pytest.mark.parametrize("kind", ["config_json", "yaml"])
def test_mutants_are_read_or_refused_in_one_line(kind, tmp_path):
  for number in range(100):
    try:
      getattr(config_mutants, kind)(random.Random(number), tmp_path)
    except ValueError as e:
      assert len(str(e).splitlines()) == 1 and len(str(e)) < 1000
