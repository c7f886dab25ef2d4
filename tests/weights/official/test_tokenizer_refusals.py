"""Unsupported or damaged official configs are refused with one line that names the field."""

import copy
import random

import pytest

from flextok_jax.core.literals import parse_json, parse_literals
from flextok_jax.weights.official.tokenizer import from_official
from flextok_jax.weights.official.writer import to_official
from tests.support.official_configs import (
  CODE,
  DEEP,
  DELETE,
  NO_LITERALS,
  OURS,
  D,
  E,
  metadata_of,
  official,
  ours,
  refused,
)

NORM = {"_target_": "flextok.model.layers.norm.Fp32LayerNorm", "_partial_": True, "elementwise_affine": False}
SPARE = {
  "_target_": "flextok.model.preprocessors.linear.LinearLayer",
  "read_key": "a",
  "write_key": "b",
  "dim_in": 3,
  "dim": 48,
}


class TestRefusals:
  @pytest.mark.parametrize(
    "path, value, pattern",
    [
      # Classes.
      ("_target_", "os.system", r"_target_ 'os.system' is not supported.*FlexTok"),
      ("vae._target_", "flextok.vae_wrapper.OtherVAE", r"vae._target_ 'flextok.vae_wrapper.OtherVAE' is not supp"),
      ("vae._target_", ["a"], r"vae._target_ \['a'\] is not supported"),
      ("vae._target_", DELETE, r"vae._target_ None is not supported"),
      ("encoder._target_", "torch.nn.Sequential", r"encoder._target_ 'torch.nn.Sequential'"),
      (
        E + "enc_transformer._target_",
        "flextok.model.trunks.transformers.FlexTransformerDecoder",
        r"enc_transformer._target_ .* is not supported here: only .*FlexTransformer",
      ),
      (E + "enc_patch_emb._target_", CODE, r"enc_patch_emb._target_"),
      (E + "enc_channels_to_last.per_sample_op._target_", "builtins.eval", r"per_sample_op._target_ 'builtins.eval'"),
      (E + "enc_channels_to_last.per_sample_op._partial_", DELETE, r"per_sample_op._partial_ .* must be True"),
      (
        E + "enc_channels_to_last.per_sample_op._target_",
        "flextok.model.utils.dict_ops.channels_last_to_first",
        r"encoder.module_dict lacks the PerSampleOp that plays 'to_channels_last'",
      ),
      (E + "enc_transformer.act_layer", {"_target_": "torch.nn.Tanh", "_partial_": True}, r"act_layer._target_"),
      (E + "enc_transformer.act_layer", {"_target_": "torch.nn.GELU"}, r"act_layer._partial_ of GELU must be True"),
      (
        E + "enc_transformer.act_layer",
        {"_target_": "hydra.utils.get_method", "path": "os.system"},
        r"act_layer.path must be .*got 'os.system'",
      ),
      (E + "enc_transformer.act_layer", None, r"act_layer must be a dictionary, got None"),
      (E + "enc_transformer.norm_layer", NORM | {"eps": 1e-6}, r"norm_layer.eps must be 1e-05, got 1e-06"),
      (D + "dec_to_patches.norm_layer", NORM | {"elementwise_affine": True}, r"dec_to_patches.norm_layer.elementwise"),
      (D + "dec_to_patches.norm_layer", None, r"dec_to_patches.norm_layer must be a dictionary"),
      ("pipeline._partial_", DELETE, r"pipeline._partial_ of MinRFPipeline must be True"),
      ("vae._partial_", True, r"vae._partial_ .* must be False"),
      ("vae._convert_", CODE, r"vae._convert_ must be"),
      # Arguments.
      ("vae.tiling", True, r"vae.tiling = True: StableDiffusionVAE has no such argument"),
      ("surprise", 1, r"surprise = 1: FlexTok has no such argument"),
      ("bad\nname", 1, r"\['bad\\nname'\] = 1: "),
      ("vae.images_read_key", DELETE, r"vae.images_read_key is missing"),
      ("vae.latent_channels", "8", r"vae.latent_channels must be a whole number .*got '8'"),
      ("vae.latent_channels", 8.0, r"vae.latent_channels must be"),
      ("vae.scaling_factor", 0, r"vae.scaling_factor must be"),
      ("vae.scaling_factor", float("nan"), r"vae.scaling_factor must be .*got nan"),
      ("vae.scaling_factor", float("inf"), r"vae.scaling_factor must be .*got inf"),
      ("vae.dtype_override", "int8", r"vae.dtype_override must be None or 'fp32'.*got 'int8'"),
      ("vae.sample_posterior", 1, r"vae.sample_posterior must be True or False, got 1"),
      ("regularizer.levels", [8, 1], r"regularizer.levels must be"),
      ("regularizer.levels", [1000] * 4, r"regularizer.levels must be levels with at most 2147483647 combinations"),
      ("regularizer.levels", [8, 6], r"enc_to_latents.dim_out must be 2.*got 3"),
      ("regularizer.drop_quant_p", 2, r"regularizer.drop_quant_p must be a number in \[0, 1\]"),
      (E + "enc_patch_emb.patch_sizes", [2, 4], r"enc_patch_emb.patch_sizes must be two equal"),
      (E + "enc_patch_emb.patch_sizes", [65, 65], r"enc_patch_emb.patch_sizes"),
      (E + "enc_patch_emb.dim", DELETE, r"enc_patch_emb.dim must be .*got None \(the default"),
      (E + "enc_patch_emb.flatten_patches", DELETE, r"enc_patch_emb.flatten_patches must be False"),
      (E + "enc_patches_posemb_module.max_sizes", [8], r"enc_patches_posemb_module.max_sizes must be two whole"),
      (E + "enc_patches_posemb_module.max_sizes", [8, 8, 8], r"enc_patches_posemb_module.max_sizes must be"),
      (E + "enc_patches_posemb_module.max_sizes", [5000, 5000], r"enc_patches_posemb_module.max_sizes must be"),
      (E + "enc_patches_posemb_module.posemb_type", "rope", r"posemb_type must be 'sincos' or .*got 'rope'"),
      (E + "enc_register_module.n_max", 10**6, r"enc_register_module.n_max must be a whole number in \[1, 65536\]"),
      (E + "enc_register_module.n_min", 17, r"enc_register_module.n_min must be at most n_max, 16"),
      (E + "enc_register_module.n_eval", 8, r"enc_register_module.n_eval must be None or n_max"),
      (E + "enc_register_module.n_max", 32, r"dec_registers_posemb_module.max_sizes must be \[32\]"),
      (E + "enc_register_module.ordering_mode", "avg_pool", r"ordering_mode must be 'nested', got 'avg_pool'"),
      (E + "enc_register_module.extra_registers_write_key", "x", r"extra_registers_write_key must be None"),
      (E + "enc_register_module.size_sampling_mode", CODE, r"size_sampling_mode must be 'uniform'"),
      (D + "dec_registers_posemb_module.posemb_type", "sincos", r"posemb_type must be 'learnable_sum' or"),
      (D + "dec_registers_posemb_module.posemb_scaling", "interpolate", r"posemb_scaling must be 'absolute' for reg"),
      (D + "dec_nested_dropout.eval_keep_k_read_key", None, r"dec_nested_dropout.eval_keep_k_read_key must be a key"),
      (D + "dec_nested_dropout.size_sampling_mode", "exponential", r"size_sampling_mode must be .*'exponential'"),
      (D + "dec_latent_dropout.eval_drop_flag_read_key", "drop", r"eval_drop_flag_read_key must be 'eval_dropout_m"),
      (D + "dec_time_embedder.frequency_embedding_size", 128, r"frequency_embedding_size must be 256, got 128"),
      (D + "dec_time_embedder.temb_as_tokens", True, r"temb_as_tokens must be False"),
      (D + "dec_time_embedder.max_timestep", 0, r"max_timestep must be"),
      (E + "enc_transformer.rope_forward_read_key", "rope", r"enc_transformer.rope_forward_read_key must be None"),
      (E + "enc_transformer.score_mod_read_key", "bias", r"enc_transformer.score_mod_read_key must be None"),
      (E + "enc_transformer.depth", 10**9, r"enc_transformer.depth must be a whole number in \[1, 1024\]"),
      (E + "enc_transformer.dim", 10**30, r"enc_transformer.dim: a whole number of 100 bits is too large"),
      (E + "enc_transformer.mlp_ratio", 1e-3, r"enc_transformer.mlp_ratio must be a ratio that leaves a hidden"),
      (E + "enc_transformer.head_dim", 5, r"enc_transformer.head_dim must be a divisor of dim 32"),
      # Inconsistent widths and sizes.
      (E + "enc_to_latents.dim", 64, r"enc_to_latents.dim must be 32, the width of .*enc_transformer, got 64"),
      (D + "dec_nested_dropout.dim", 64, r"dec_nested_dropout.dim must be 48"),
      (D + "dec_noise_patch_emb.channels_in", 16, r"dec_noise_patch_emb.channels_in must be 8"),
      (D + "dec_to_patches.channels_out", 4, r"dec_to_patches.channels_out must be 8"),
      (D + "dec_to_patches.patch_sizes", [4, 4], r"dec_to_patches.patch_sizes must be \[2, 2\]"),
      (D + "dec_from_latents.dim_in", 4, r"dec_from_latents.dim_in must be 3"),
      ("pipeline.out_channels", 3, r"pipeline.out_channels must be 8"),
      # Modulation.
      (E + "enc_transformer.adaLN_emb_read_key", "t", r"enc_transformer.adaLN_emb_read_key must be None"),
      (E + "enc_to_latents.adaLN_emb_read_key", "t", r"enc_to_latents.adaLN_emb_read_key must be None"),
      (D + "dec_transformer.adaLN_emb_read_key", None, r"dec_transformer.adaLN_emb_read_key: key None"),
      (D + "dec_transformer.adaLN_packing_fn_read_key", DELETE, r"adaLN_packing_fn_read_key: key None"),
      (D + "dec_transformer.adaLN_expansion", 1, r"dec_transformer.adaLN_expansion must be 2 beside per_subseq_embs"),
      (D + "dec_seq_packer.per_subseq_embs", False, r"dec_transformer.adaLN_expansion must be .*got 2"),
      (D + "dec_to_patches.adaLN_packing_fn_read_key", "dec_emb_packing_fn", r"adaLN_packing_fn_read_key must be None"),
      (D + "dec_to_patches.adaLN_emb_read_key", "other", r"dec_to_patches.adaLN_emb_read_key: key 'other' is written"),
      # Wiring.
      (
        E + "enc_seq_packer.input_list_read_keys",
        ["enc_registers", "enc_patches"],
        r"enc_seq_packer.input_list_read_keys: key 'enc_registers' holds the registers; needed: the patches with pos",
      ),
      (E + "enc_seq_packer.input_list_read_keys", ["enc_patches"], r"input_list_read_keys must be 2 keys"),
      (E + "enc_seq_packer.mask_mode", "full", r"enc_seq_packer.mask_mode must be 'causal_last'"),
      (D + "dec_seq_packer.mask_mode", "causal", r"dec_seq_packer.mask_mode must be 'full'"),
      (E + "enc_transformer.block_mask_read_key", DELETE, r"enc_transformer.block_mask_read_key: key None"),
      (E + "enc_to_latents.read_key", "enc_patches", r"enc_to_latents.read_key: key 'enc_patches' holds the transf"),
      (E + "enc_patch_emb.n_patches_write_key", "enc_patches", r"enc_patches_posemb_module.read_key: key 'enc_patches"),
      (E + "enc_unpacker.inner_seq_write_keys", ["enc_registers"], r"enc_unpacker.inner_seq_write_keys must be 2 keys"),
      (E + "enc_unpacker.inner_packed_shapes_read_key", "enc_ps_outer", r"enc_unpacker.inner_packed_shapes_read_key"),
      (D + "dec_latent_dropout.read_write_key", "quants", r"dec_latent_dropout.read_write_key: key 'quants' holds the"),
      (D + "dec_channels_to_first.write_key", "elsewhere", r"pipeline.reconst_write_key: key 'vae_latents_reconst' is"),
      ("regularizer.latents_read_key", "enc_patches", r"regularizer.latents_read_key: key 'enc_patches' holds the"),
      ("regularizer.quants_write_key", "codes", r"dec_from_latents.read_key: key 'quants' is written by nothing"),
      ("vae.vae_latents_read_key", "x", r"vae.vae_latents_read_key must be key 'vae_latents_reconst', got 'x'"),
      ("flow_matching_noise_module.clean_images_read_key", "rgb", r"noise_module.clean_images_read_key must be key"),
      ("flow_matching_noise_module.timesteps_write_key", "t", r"noise_module.timesteps_write_key must be key 'times"),
      ("pipeline.timesteps_read_key", "t", r"dec_time_embedder.timesteps_read_key: key 'timesteps' is written by no"),
      ("pipeline.noised_images_read_key", "timesteps", r"dec_time_embedder|dec_noise_channels_to_last"),
      # Modules.
      (E + "enc_register_module", DELETE, r"encoder.module_dict lacks the Registers1D that plays 'registers'"),
      (D + "dec_latent_dropout", DELETE, r"decoder.module_dict lacks the LearnedNullCond or ZeroNullCond"),
      (D + "dec_channels_to_first", DELETE, r"lacks the PerSampleOp that plays 'to_channels_first'"),
      (D + "spare", SPARE, r"only one module can be the LinearLayer that plays 'code_embed'"),
      (E + "spare", SPARE, r"encoder.module_dict.spare._target_ 'flextok.model.preprocessors.linear.LinearLayer' is n"),
      (
        E + "spare",
        to_official(OURS)["decoder"]["module_dict"]["dec_channels_to_first"],
        r"encoder.module_dict.spare: no part for this PerSampleOp in the encoder",
      ),
      (E + "spare", 3, r"encoder.module_dict.spare must be a dictionary with a _target_, got 3"),
      (E + "_partial_", True, r"a module's name must be of letters.*'_partial_'"),
      (E + "a\nb", SPARE, r"a module's name must be of letters.*'a\\nb'"),
      ("encoder.module_dict", [], r"encoder.module_dict must be a dictionary"),
      ("decoder", DELETE, r"decoder is missing"),
      ("regularizer", None, r"regularizer must be a dictionary, got None"),
      # Sizes of the config's text.
      ("vae.images_read_key", DEEP, r"nested deeper than 32"),
      ("vae.images_read_key", [0] * 30_000, r"more than 20000 values"),
      ("vae.images_read_key", "x" * 300, r"vae.images_read_key must be a key"),
      ("vae.images_read_key", object(), r"vae.images_read_key must be plain data .*got a object"),
      ("vae.images_read_key", {1: 2}, r"vae.images_read_key: a key must be text, got one of type int"),
    ],
  )
  def test_refusals_name_the_field(self, path, value, pattern):
    refused(pattern, from_official, official({path: value}))

  @pytest.mark.parametrize("config", [None, 3, "x", [], {}, {"config": 3}, {"config": {}}, {1: 2}, b"x"], ids=str)
  def test_invalid_configurations(self, config):
    refused(None, from_official, config)

  @pytest.mark.parametrize(
    "changes, pattern",
    [
      (dict(stage="vae"), "stage must be 'tokenizer'"),
      (dict(vae__kind="pixels"), "vae.kind must be 'autoencoder_kl'"),
      (dict(vae__dtype="float64"), "vae.dtype must be one of"),
      (dict(flow__t_sampling="cosine"), "flow.t_sampling must be one of"),
      (dict(encoder__activation="tanh"), "encoder.activation must be one of"),
      (dict(decoder__modulation="none"), "decoder.modulation must be one of"),
      (dict(tokens__mask="attention"), "tokens.mask must be one of 'token', got 'attention'"),
      (dict(decoder__null_condition=None), "decoder.null_condition must be one of"),
      (dict(tokens__nested_dropout="geometric"), "dec_nested_dropout.size_sampling_mode must be"),
      (dict(tokens__levels=(8, 1)), "regularizer.levels must be"),
      (dict(encoder__head_dim=7), "enc_transformer.head_dim must be a divisor"),
      (dict(encoder__readout_multiplier=0.3), "encoder.readout_multiplier must be a whole base width"),
      (dict(encoder__readout_multiplier=0.5, decoder__readout_multiplier=0.5), "different base widths"),
      (dict(decoder__qk_norm=DELETE), "the configuration has no field decoder.qk_norm"),
      (dict(encoder__max_grid_width=4), "encoder.max_grid_width must be 8, .* another table of 8 x 4 positions"),
      (
        dict(decoder__posemb="learnable_sum", decoder__max_grid_width=4),
        "max_sizes must be two equal numbers for lear",
      ),
      (dict(decoder__posemb_scaling="scaled"), "posemb_scaling must be 'absolute' or 'interpolate', got 'scaled'"),
      (dict(encoder__max_grid=0), "the configuration has no field vae.block_out_channels"),
    ],
    ids=str,
  )
  def test_writing_unsupported_settings(self, changes, pattern):
    refused(pattern, to_official, ours(**changes))


@pytest.mark.parametrize("text", NO_LITERALS, ids=lambda text: repr(text[:20]))
def test_targets_that_are_not_literals(text):
  refused(None, from_official, {"_target_": text})


def nodes(config, path=()):
  """Yields every (parent, key) of a tree."""
  items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
  for key, value in list(items):
    yield config, key
    yield from nodes(value)


JUNK = [
  None,
  True,
  False,
  0,
  -1,
  1,
  3,
  10**30,
  -(10**5000),
  0.5,
  1e308,
  float("nan"),
  float("inf"),
  "",
  "x",
  "enc_patches",
  "a\nb",
  "\ud800",
  "x" * 1000,
  CODE,
  [],
  {},
  [[]],
  [1, 1],
  [8, 8],
  ["a", "b"],
  {"_target_": "os.system"},
  {"_target_": ["x"]},
  {"_target_": "torch.nn.GELU", "_partial_": True},
  {1: 2},
  {"a\nb": 1},
  set(),
  b"x",
  object(),
  len,
  DEEP,
  (1, 2),
  SPARE,
  2**31,
  "None",
]


def mutate(config, rng):
  parent, key = rng.choice(list(nodes(config)))
  kind = rng.choice(["delete", "retype", "rename", "nest", "replace", "replace", "swap", "add"])
  value = parent[key]
  if kind == "delete":
    del parent[key]
  elif kind == "retype":
    retyped = [str(value), [value], {"x": value}, len(str(value)), float(len(str(value))), bool(value)]
    parent[key] = rng.choice(retyped)
  elif kind == "rename" and isinstance(parent, dict):
    parent[rng.choice(["x", "_target_", "dim", "a b", "\n", "", 5, None])] = parent.pop(key)
  elif kind == "nest":
    for _ in range(rng.choice([1, 2, 40])):
      value = rng.choice([[value], {"module_dict": value}, {"_target_": value}])
    parent[key] = value
  elif kind == "replace":
    parent[key] = copy.copy(rng.choice(JUNK))
  elif kind == "swap":
    other, name = rng.choice(list(nodes(config)))
    parent[key] = copy.deepcopy(other[name])
  elif isinstance(parent, dict):
    parent[rng.choice(["extra", "dim", "_args_", "_partial_", "_convert_"])] = rng.choice(JUNK)


class TestFuzz:
  def check(self, call, *args):
    """Asserts that a call succeeds or raises a one-line error; returns whether it succeeded."""
    try:
      call(*args)
      return True
    except ValueError as e:
      line = str(e)
      assert line and len(line.splitlines()) == 1 and len(line) < 3000, line
      return False

  def test_mutated_configs(self):
    read = 0
    for seed in range(400):
      rng = random.Random(seed)
      config = official()
      for _ in range(rng.choice([1, 1, 1, 2, 4])):
        mutate(config, rng)
      read += self.check(from_official, config)
    assert 10 < read < 200  # some changes are harmless, most are not

  def test_mutated_texts(self):
    metadata = metadata_of(official())
    for seed in range(300):
      rng = random.Random(seed)
      name = rng.choice(sorted(metadata))
      text = list(metadata[name])
      for _ in range(rng.choice([1, 2, 5])):
        position = rng.randrange(len(text) + 1)
        text[position : position + rng.choice([0, 1, 1, 10])] = rng.choice(["", *"'{[\\-e\né"])
      changed = metadata | {name: "".join(text)}
      self.check(lambda changed=changed: from_official(parse_literals(changed)))
      self.check(parse_json, "".join(text), "some file")
