"""The choices that encoder and decoder leave open, each against the plain numpy statement in float64.

Parameters are normals of deviation 0.1, those that start at zero too. The tolerance GAP is ten times the largest gap
measured on a CPU: 1.7e-6 for encoder outputs (of size 2) and 1.9e-6 for velocities (of size 3).
"""

import dataclasses
import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from flextok_jax import config as common
from flextok_jax.models.tokenizer.decoder import Decoder
from flextok_jax.models.tokenizer.encoder import Encoder
from flextok_jax.ops import posemb
from flextok_jax.stages import make_stage
from flextok_jax.stages.tokenizer import make_model
from tests.support import numpy_reference as reference
from tests.support.golden_weights import to_official

LEVELS, REGISTERS = (8, 6, 5), 5
GRID = dict(layout="grid", num_registers=25, nested_dropout="none")
PART = dict(width=64, depth=2, head_dim=32, patch_size=4)
GAP = 2e-5

BOTH = {  # options of encoder and decoder, as config fields
  "mlp_ratio": dict(mlp_ratio=2.7),
  "plain_mlp": dict(gated_mlp=False),
  "plain_mlp_bias": dict(gated_mlp=False, mlp_bias=True, mlp_ratio=1.5),
  "gelu": dict(activation="gelu"),
  "gelu_tanh": dict(activation="gelu_tanh"),
  "relu": dict(activation="relu"),
  "quick_gelu": dict(activation="quick_gelu"),
  "no_qk_norm": dict(qk_norm=False),
  "qkv_bias": dict(qkv_bias=True),
  "out_bias": dict(out_bias=True),
  "mlp_bias": dict(mlp_bias=True),
  "sum": dict(posemb="learnable_sum"),
  "prod": dict(posemb="learnable_prod", max_grid=7),
  "interpolated_sincos": dict(posemb_scaling="interpolate", max_grid=4),
  "interpolated_sum": dict(posemb="learnable_sum", posemb_scaling="interpolate", max_grid=7),
  "interpolated_prod": dict(posemb="learnable_prod", posemb_scaling="interpolate", max_grid=2),
  "scaled": dict(posemb_scaling="scaled", max_grid=7),
  "scaled_rectangle": dict(posemb_scaling="scaled", max_grid=3, max_grid_width=9),
  "interpolated_rectangle": dict(posemb="learnable_prod", posemb_scaling="interpolate", max_grid=7, max_grid_width=3),
  "released_rectangle": dict(posemb="sincos_released", max_grid=5, max_grid_width=8),
  "interpolated_released": dict(posemb="sincos_released", posemb_scaling="interpolate", max_grid=4, max_grid_width=7),
  "no_head_bias": dict(head_bias=False),
  "readout": dict(readout_multiplier=0.3),
}
DECODER = {
  "shared": dict(modulation="shared"),
  "no_head_modulation": dict(head_modulation=False),
  "no_head_modulation_bias": dict(head_modulation_bias=False),
  "no_code_bias": dict(code_bias=False),
  "max_timestep": dict(max_timestep=40.0),
  "single": dict(null_condition="single"),
  "zero": dict(null_condition="zero"),
}
EVERYTHING = dict(
  mlp_ratio=1.5,
  gated_mlp=False,
  activation="gelu",
  qk_norm=False,
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  posemb="learnable_sum",
  posemb_scaling="interpolate",
  max_grid=3,
  head_bias=False,
  readout_multiplier=0.5,
)
EVERYTHING_DECODER = dict(
  modulation="shared", head_modulation_bias=False, code_bias=False, max_timestep=2.0, null_condition="single"
)
VARIANTS = {"released": ({}, {})}
VARIANTS |= {name: (fields, fields) for name, fields in BOTH.items()}
VARIANTS |= {name: ({}, fields) for name, fields in DECODER.items()}
VARIANTS["everything"] = EVERYTHING, EVERYTHING | EVERYTHING_DECODER


def config_of(encoder=(), decoder=(), **overrides):
  defaults = dict(
    image_size=20,
    dtype="float32",
    vae=dict(kind="pixels", scaling_factor=1.0),
    tokens=dict(num_registers=REGISTERS, levels=LEVELS, nested_dropout="uniform"),
  )
  return common.derive(**defaults | overrides, encoder=PART | dict(encoder), decoder=PART | dict(decoder))


def fill(tree):
  """Fills every leaf with normals that depend only on its path and shape."""

  def draw(path, x):
    rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return (0.1 * rng.normal(size=x.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, tree)


def gap(actual, desired, atol):
  """Asserts equal shapes and that the largest difference is below atol."""
  assert actual.shape == desired.shape
  assert np.abs(actual - desired).max() < atol


def official(params):
  """Our tree {"encoder", "decoder"} in official names and layouts, float64."""
  return reference.float64(to_official(params))


def options(fields):
  """Options of a config section that the numpy reference takes."""
  names = (
    "activation",
    "qk_norm",
    "posemb",
    "posemb_scaling",
    "max_grid",
    "max_grid_width",
    "readout_multiplier",
    "max_timestep",
  )
  told = {name: fields[name] for name in names if name in fields}
  return reference.Options(**told, single_null=fields.get("null_condition") == "single")


class Inputs:
  """Latents of 3x5 patches; four samples, the last two without condition."""

  def __init__(self):
    rng = np.random.default_rng(0)
    self.latents = rng.normal(size=(4, 12, 20, 3)).astype(np.float32)
    self.codes = reference.fsq_lookup(rng.integers(0, np.prod(LEVELS), (4, REGISTERS)), LEVELS).astype(np.float32)
    self.t = np.array([0.03, 0.001, 0.011, 0.02], np.float32)  # float32 knows the sines of small angles best
    self.keep_k = np.array([1, 3, 5, 2])
    self.null = np.array([False, False, True, True])

  def velocity_args(self):
    return self.latents, self.t, self.codes, self.keep_k, self.null


@functools.cache
def built(name, **overrides):
  """The model of a variant and its random parameters."""
  model = make_model(config_of(*VARIANTS[name], **overrides))
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 20, 20, 3)))["params"]
  return model, fill(nn.unbox(shapes))


@functools.cache
def outputs(name):
  """Encoder outputs and velocities of a variant."""
  model, params = built(name)
  apply = functools.partial(model.apply, {"params": params})
  z, v = apply(Inputs().latents, method="encode_registers"), apply(*Inputs().velocity_args(), method="velocity")
  return np.asarray(z), np.asarray(v)


@pytest.mark.parametrize("name", VARIANTS)
def test_against_numpy(name):
  (z, v), (encoder, decoder) = outputs(name), VARIANTS[name]
  w, inputs, head_dim = official(built(name)[1]), Inputs(), PART["head_dim"]
  gap(z, reference.encode(w, inputs.latents, head_dim, options(encoder)), GAP)
  gap(v, reference.velocity(w, *inputs.velocity_args(), head_dim, options(decoder)), GAP)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "released"])
def test_every_option_changes_the_outputs(name):
  """In all samples that it is about; parameters of one name and shape have one value in both models."""
  (z, v), (z_released, v_released), (encoder, _) = outputs(name), outputs("released"), VARIANTS[name]
  changed = (np.abs(z - z_released) > 100 * GAP).any((1, 2))
  np.testing.assert_array_equal(changed, bool(encoder))
  changed = (np.abs(v - v_released) > 100 * GAP).any((1, 2, 3))
  null_only, conditional_only = name in ("single", "zero"), name == "no_code_bias"
  np.testing.assert_array_equal(changed, [not null_only] * 2 + [not conditional_only] * 2)


# Positions.


@pytest.mark.parametrize("product", [False, True])
def test_interpolating_to_the_same_grid_changes_nothing(product):
  axes = tuple(np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32))
  table = posemb.grid_table(axes, 5, 5, product=product)
  assert table.dtype == jnp.float32
  np.testing.assert_array_equal(posemb.grid_table(axes, 5, 5, scaling="interpolate", product=product), table)
  resized = posemb.grid_table(axes, 9, 1, scaling="interpolate", product=product)
  np.testing.assert_array_equal(resized[::2], table[:, :1])
  halves = (np.float64(table[1:, :1]) + table[:-1, :1]) / 2
  np.testing.assert_allclose(resized[1::2], halves, atol=1e-6)


@pytest.mark.parametrize("name", ["scaled", "interpolated_sum"])
def test_a_wide_image(name):
  """2:1, more patches per row than the table has."""
  (encoder, decoder), (model, params) = VARIANTS[name], built(name)
  latents = np.random.default_rng(1).normal(size=(1, 16, 32, 3)).astype(np.float32)
  apply = functools.partial(model.apply, {"params": params})
  z = apply(latents, method="encode_registers")
  gap(z, reference.encode(official(params), latents, PART["head_dim"], options(encoder)), GAP)
  args = latents, np.float32([0.02]), Inputs().codes[:1], np.array([4]), np.array([False])
  v = apply(*args, method="velocity")
  gap(v, reference.velocity(official(params), *args, PART["head_dim"], options(decoder)), GAP)


def test_scaling_to_the_size_of_the_table_changes_nothing():
  for shape in ((5, 5), (3, 7)):
    table = posemb.grid_table(posemb.sincos_axes(*shape, 16), *shape)
    np.testing.assert_array_equal(posemb.grid_table(posemb.scaled_axes(shape, *shape, 16), *shape), table)
    wider = posemb.grid_table(posemb.scaled_axes(shape, 1, 9, 16), 1, 9)
    np.testing.assert_array_equal(wider[0, [0, 8]], table[0, [0, -1]])
    np.testing.assert_allclose(np.linalg.norm(wider, axis=-1), np.sqrt(8), rtol=1e-6)
  square = posemb.grid_table(posemb.sincos_axes(5, 5, 16), 5, 5)
  np.testing.assert_array_equal(posemb.fit_table(posemb.released_table((5, 5), 16), 5, 5), square)


def test_the_grid_of_image_size_is_the_largest():
  model, params = built("released")
  apply = functools.partial(model.apply, {"params": params}, method="encode_registers")
  encode = lambda h, w: jax.eval_shape(apply, jnp.ones((1, 4 * h, 4 * w, 3)))
  assert encode(5, 1).shape == encode(1, 5).shape == (1, REGISTERS, len(LEVELS))
  with pytest.raises(ValueError, match="grid of 2 x 6 patches does not fit max_grid 5: .*'interpolate'") as error:
    encode(2, 6)
  assert "\n" not in str(error.value)


# The models as a whole.


def test_encoder_ends_in_float32():
  """FSQ rounds its output: 24 bits of it count, though bfloat16 has 8."""
  model, params = built("released", dtype="bfloat16")
  z = np.asarray(
    jax.jit(functools.partial(model.apply, method="encode_registers"))({"params": params}, Inputs().latents)
  )
  assert z.dtype == np.float32
  assert (z != z.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.9
  exact = outputs("released")[0]
  assert 1e-4 < np.linalg.norm(z - exact) / np.linalg.norm(exact) < 0.02


def test_gradients_reach_every_parameter_and_all_have_named_axes():
  config = config_of(*VARIANTS["everything"])
  config.tokens.null_prob = 0.5
  stage = make_stage(config)
  boxed, _ = jax.eval_shape(stage.init, jax.random.key(0))
  boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(isinstance(x, nn.LogicallyPartitioned) and len(x.names) == x.value.ndim for x in boxes)
  batch = {"image": np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), np.uint8)}
  grads = jax.jit(jax.grad(lambda *args: stage.loss_fn(*args)[0]))(fill(nn.unbox(boxed)), batch, jax.random.key(0), 0)
  for path, grad in jax.tree_util.tree_leaves_with_path(jax.device_get(grads)):
    assert np.isfinite(grad).all() and (grad != 0).any(), jax.tree_util.keystr(path)


def test_a_grid_trains_alike_on_both_paths():
  """The same loss and gradients with buckets and without; they reach every parameter."""
  config = config_of(
    tokens=GRID | dict(levels=LEVELS, null_prob=0.25, bucket_rows=4), decoder=dict(modulation="shared")
  )
  batch = {"image": np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), np.uint8)}
  found = []
  for fast in (True, False):
    config.fast = fast
    stage = make_stage(config)
    params = fill(nn.unbox(jax.eval_shape(stage.init, jax.random.key(0))[0]))
    loss = lambda params, stage=stage: stage.loss_fn(params, batch, jax.random.key(0), 0)[0]
    found.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(params)))
  (loss, grads), (plain_loss, plain) = found
  np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(plain)):
    assert np.abs(b).max() > 0 and np.abs(a - b).max() < 2e-5 * np.abs(b).max(), jax.tree_util.keystr(path)


OWN = {"num_registers", "layout", "mask", "code_dim", "dtype", "remat", "attention", "parent", "name"}  # from elsewhere


@pytest.mark.parametrize("section, module", [("encoder", Encoder), ("decoder", Decoder)])
def test_a_section_has_the_fields_of_its_module_and_their_defaults(section, module):
  config = common.get_config()[section]
  fields = {field.name: field.default for field in dataclasses.fields(module) if field.name not in OWN}
  assert set(fields) == set(config)
  given = {name: default for name, default in fields.items() if default is not dataclasses.MISSING}
  assert set(fields) - set(given) == {"width", "depth", "head_dim", "patch_size"}
  assert given == {name: config[name] for name in given}


def test_default_options_build_the_released_model():
  new, old = config_of(), config_of().to_dict()
  old["encoder"] = old["decoder"] = PART
  assert make_model(ConfigDict(old)) == make_model(new)
  assert make_model(new) != make_model(config_of(dict(qk_norm=False)))


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(encoder=dict(activation="swish")), "encoder.activation must be one of silu, gelu, gelu_tanh, relu"),
    (dict(decoder=dict(posemb="rope")), "decoder.posemb must be one of sincos, learnable_sum"),
    (dict(encoder=dict(posemb_scaling="crop")), "encoder.posemb_scaling must be .*, got 'crop'"),
    (dict(decoder=dict(modulation="none")), "decoder.modulation must be one of per_segment, shared, got 'none'"),
    (dict(decoder=dict(null_condition="")), "decoder.null_condition must be .*, got ''"),
    (dict(encoder=dict(mlp_ratio=0.0)), "encoder.mlp_ratio must be .*, got 0.0"),
    (dict(decoder=dict(mlp_ratio=float("nan"))), "decoder.mlp_ratio must be .*, got nan"),
    (dict(encoder=dict(mlp_ratio=1e-3)), "encoder.mlp_ratio=0.001 .* leaves no hidden width"),
    (dict(decoder=dict(max_timestep=-1.0)), "decoder.max_timestep must be .*, got -1.0"),
    (dict(encoder=dict(readout_multiplier=float("inf"))), "readout_multiplier must be a finite .*, got inf"),
    (dict(decoder=dict(max_grid=-1)), "decoder.max_grid must be .*, got -1"),
    (dict(encoder=dict(max_grid=4)), "encoder.max_grid 4 is less than the 5 patches per side of image_size 20"),
    (dict(encoder=dict(max_grid=9, max_grid_width=4)), "encoder.max_grid_width 4 is less than the 5 patches per side"),
    (
      dict(decoder=dict(posemb="learnable_sum", posemb_scaling="scaled")),
      "decoder.posemb_scaling 'scaled' computes positions, and decoder.posemb 'learnable_sum' has a table",
    ),
    (dict(encoder=dict(width=66, head_dim=33)), "encoder.width 66 is not a multiple of 4, .* 'sincos'"),
    (dict(flow=dict(mode_scale=1.76)), "flow.mode_scale must be .*, got 1.76"),
    (dict(flow=dict(mode_scale=-1.01)), "flow.mode_scale must be .*, got -1.01"),
    (dict(flow=dict(mode_scale=float("nan"))), "flow.mode_scale must be .*, got nan"),
    (
      dict(tokens=GRID | dict(num_registers=9)),
      "a token for each of 25 patches: tokens.num_registers must be 25, got 9",
    ),
    (dict(tokens=GRID | dict(mask="attention")), "'grid' .*: tokens.mask must be 'token', got 'attention'"),
    (dict(tokens=dict(mask="tokens")), "tokens.mask must be one of token, attention, got 'tokens'"),
    (dict(tokens=GRID | dict(nested_dropout="pow2")), "'grid' .*: tokens.nested_dropout must be 'none', got 'pow2'"),
    (dict(tokens=GRID), "'grid' .*: decoder.modulation must be 'shared', got 'per_segment'"),
    (
      dict(tokens=GRID, decoder=dict(patch_size=5, modulation="shared")),
      "decoder.patch_size 5 must divide encoder.patch_size 4",
    ),
  ],
)
def test_invalid_values_are_one_line_errors(fields, words):
  with pytest.raises(ValueError, match=words) as error:
    make_stage(config_of(**fields))
  assert "\n" not in str(error.value)


def test_values_at_the_edge():
  make_stage(config_of(flow=dict(mode_scale=-1.0)))
  make_stage(config_of(flow=dict(mode_scale=1.75)))
  make_model(config_of(dict(max_grid=4, posemb_scaling="interpolate")))
  make_model(config_of(dict(width=66, head_dim=33, posemb="learnable_sum")))
