"""Configs of official tokenizers to our settings and back."""

import copy
import json
import random
import re

from ml_collections import ConfigDict
import pytest

from flextok_jax.core.literals import parse_json, parse_literals
from flextok_jax.weights.official.tokenizer import from_official
from flextok_jax.weights.official.tokenizer_names import DEFAULT_ROLES
from flextok_jax.weights.official.writer import to_official
from tests.support.official_configs import DELETE, OURS, D, E, metadata_of, official, ours, refused, settings


def renamed(config, names):
  """Returns a copy with renamed and reordered modules."""
  config = copy.deepcopy(config)
  for half in ("encoder", "decoder"):
    modules = list(config[half]["module_dict"].items())
    names.shuffle(modules)
    config[half]["module_dict"] = {f"m{names.randrange(10**6)}_{i}": value for i, (_, value) in enumerate(modules)}
  return config


class TestGolden:
  @pytest.fixture
  def golden(self, shared):
    return json.loads((shared / "golden/flextok_tiny_config.json").read_text())

  def test_settings(self, golden):
    read, roles = from_official(golden)
    expected = ours(
      vae__latent_channels=16,
      vae__scaling_factor=0.18,
      encoder__width=128,
      encoder__head_dim=64,
      decoder__width=192,
      decoder__head_dim=64,
      tokens__levels=(8, 8, 8, 5, 5, 5),
      tokens__null_prob=0.2,
      tokens__nested_dropout="uniform_pow2",
    )
    assert read == expected and roles == DEFAULT_ROLES

  def test_round_trip_keeps_values_and_order(self, golden):
    written = to_official(settings(golden))
    assert written == golden
    for half in ("encoder", "decoder"):
      assert list(written[half]["module_dict"]) == list(golden[half]["module_dict"])

  def test_metadata_of_the_weights(self, golden, shared):
    with open(shared / "golden/flextok_tiny.safetensors", "rb") as f:
      header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    assert parse_literals(header["__metadata__"]) == golden

  def test_roles_are_prefixes_of_tensor_names(self, shared, golden):
    keys = json.loads((shared / "golden/flextok_tiny_keys.json").read_text())
    for role in from_official(golden)[1].values():
      assert any(key.startswith(f"{role}.") for key in keys), role


class TestForms:
  """The same configuration in all forms in which it is stored."""

  def test_metadata(self):
    read = parse_literals(metadata_of(official()) | {"format": "pt"})
    assert read == official() and settings(read) == OURS

  def test_metadata_as_json_and_with_quoted_target(self):
    metadata = {name: json.dumps(value) for name, value in official().items()}
    assert metadata["_target_"].startswith('"') and settings(parse_literals(metadata)) == OURS

  @pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"config": c}])
  def test_hub(self, wrap):
    config = official()
    del config["_target_"]
    assert settings(parse_json(json.dumps(wrap(config), sort_keys=True), "config.json")) == OURS

  def test_from_hub_class_and_control_keys(self):
    changes = {"_target_": "flextok.flextok_wrapper.FlexTokFromHub", "_convert_": "all", "vae._recursive_": True}
    assert settings(official(changes)) == OURS

  def test_config_dict_and_tuples(self):
    assert to_official(ConfigDict(OURS)) == official()
    assert settings(official({E + "enc_patch_emb.patch_sizes": (2, 2)})) == OURS

  def test_input_is_not_modified(self):
    config = official()
    from_official(config)
    assert config == official()

  @pytest.mark.parametrize("seed", range(5))
  def test_names_and_order_of_modules_do_not_matter(self, seed):
    config = renamed(official(), random.Random(seed))
    read, roles = from_official(config)
    assert read == OURS and roles.keys() == DEFAULT_ROLES.keys()
    for role, path in roles.items():
      half, _, name = path.split(".")
      assert config[half]["module_dict"][name] == official()[half]["module_dict"][DEFAULT_ROLES[role].split(".")[2]]

  def test_renamed_keys_of_the_passed_dictionary(self):
    text = str(official())
    for key in ("enc_patches", "dec_quants", "timesteps", "vae_latents_noised", "eval_keep_k", "dec_temb"):
      text = re.sub(f"(_keys?': )'{key}'", rf"\1'other {key}'", text)
      text = re.sub(f"\\['{key}', ", f"['other {key}', ", text)
      text = re.sub(f", '{key}'\\]", f", 'other {key}']", text)
    text = text.replace("'enc_latents'", "'enc_registers'")  # the head writes to the key it reads
    config = parse_literals({"c": text})["c"]
    assert config != official() and settings(config) == OURS


class TestOptions:
  @pytest.mark.parametrize(
    "changes",
    [
      *(
        {f"{half}__{name}": value}
        for half in ("encoder", "decoder")
        for name, value in (
          ("width", 64),
          ("depth", 28),
          ("head_dim", 4),
          ("patch_size", 1),
          ("mlp_ratio", 2.5),
          ("gated_mlp", False),
          ("activation", "gelu"),
          ("activation", "gelu_tanh"),
          ("activation", "relu"),
          ("qk_norm", False),
          ("qkv_bias", True),
          ("out_bias", True),
          ("mlp_bias", True),
          ("posemb", "learnable_sum"),
          ("posemb", "learnable_prod"),
          ("posemb_scaling", "interpolate"),
          ("max_grid", 32),
          ("head_bias", False),
        )
      ),
      dict(encoder__posemb="sincos_released", encoder__max_grid_width=4),
      dict(decoder__posemb="sincos_released", decoder__max_grid_width=32, decoder__posemb_scaling="interpolate"),
      dict(decoder__modulation="shared"),
      dict(decoder__head_modulation=False),
      dict(decoder__head_modulation_bias=False),
      dict(decoder__code_bias=False),
      dict(decoder__max_timestep=1000.0),
      dict(decoder__null_condition="single"),
      dict(decoder__null_condition="zero"),
      dict(tokens__num_registers=256),
      dict(tokens__levels=(7, 5, 5, 5, 5)),
      dict(tokens__nested_dropout="uniform"),
      dict(tokens__nested_dropout="uniform_pow2"),
      dict(tokens__null_prob=0.0),
      dict(flow__t_sampling="logit_normal"),
      dict(flow__t_sampling="stratified_logit_normal", flow__mode_scale=0.0),
      dict(flow__t_sampling="uniform", flow__mode_scale=0.0),
      dict(flow__mode_scale=1.29),
      dict(vae__latent_channels=4),
      dict(vae__scaling_factor=None),
      dict(vae__sample_posterior=True),
      dict(vae__dtype="bfloat16"),
      dict(vae__dtype="float16"),
    ],
    ids=str,
  )
  def test_round_trip(self, changes):
    config = ours(**changes)
    written = to_official(config)
    assert written != official()
    assert settings(written) == config
    assert settings(parse_literals(metadata_of(written))) == config

  def test_grid_is_derived_from_the_image_size(self):
    config = ours(encoder__max_grid=0, decoder__max_grid=0, image_size=128, vae__block_out_channels=(8, 8, 16))
    read = settings(to_official(config))
    assert read["encoder"]["max_grid"] == read["decoder"]["max_grid"] == 128 // 4 // 2

  def test_mup(self):
    config = ours(encoder__readout_multiplier=0.5, decoder__readout_multiplier=16 / 48)
    written = to_official(config)
    assert written["encoder"]["module_dict"]["enc_to_latents"]["use_mup_readout"] is True
    assert settings(written, mup_base_width=16) == config
    refused(r"enc_to_latents.use_mup_readout .*pass mup_base_width", from_official, written)
    one = settings(to_official(ours(decoder__readout_multiplier=0.5)), mup_base_width=24)
    assert one["encoder"]["readout_multiplier"] == 1 and one["decoder"]["readout_multiplier"] == 0.5
    assert settings(official(), mup_base_width=24) == OURS  # no readout multiplier

  @pytest.mark.parametrize("width", [0, -1, 1.5, True, "64"])
  def test_mup_base_width(self, width):
    refused("mup_base_width must be", from_official, official(), width)

  @pytest.mark.parametrize(
    "path, value, field, expected",
    [
      ("vae.hf_hub_path", "someone/vae", "vae.hub_id", "someone/vae"),
      ("vae.dtype_override", None, "vae.dtype", "float32"),
      ("vae.dtype_override", "bfloat16", "vae.dtype", "bfloat16"),
      ("vae.scaling_factor", 1, "vae.scaling_factor", 1.0),
      ("vae.sample_posterior", DELETE, "vae.sample_posterior", True),
      (E + "enc_transformer.mlp_ratio", 3, "encoder.mlp_ratio", 3.0),
      (
        E + "enc_transformer.act_layer",
        {"_target_": "torch.nn.modules.activation.ReLU", "_partial_": True},
        "encoder.activation",
        "relu",
      ),
      (
        E + "enc_transformer.act_layer",
        {"_target_": "torch.nn.GELU", "_partial_": True, "approximate": "tanh"},
        "encoder.activation",
        "gelu_tanh",
      ),
      (
        D + "dec_transformer.act_layer",
        {"_target_": "hydra.utils.get_class", "path": "torch.nn.GELU"},
        "decoder.activation",
        "gelu",
      ),
      (
        D + "dec_transformer.act_layer",
        {"_target_": "hydra.utils.get_method", "path": "torch.nn.SiLU"},
        "decoder.activation",
        "silu",
      ),
      (E + "enc_patches_posemb_module.posemb_type", DELETE, "encoder.posemb", "sincos"),
      (D + "dec_time_embedder.max_timestep", DELETE, "decoder.max_timestep", 1000.0),
      (D + "dec_nested_dropout.size_sampling_mode", DELETE, "tokens.nested_dropout", "uniform"),
      (D + "dec_latent_dropout.dropout_prob", DELETE, "tokens.null_prob", 0.0),
      ("flow_matching_noise_module.ln", DELETE, "flow.t_sampling", "logit_normal"),
      ("flow_matching_noise_module.mode_scale", DELETE, "flow.t_sampling", "uniform"),
    ],
  )
  def test_alternative_forms_and_defaults(self, path, value, field, expected):
    section, name = field.split(".")
    assert settings(official({path: value}))[section][name] == expected

  @pytest.mark.parametrize(
    "path, value",
    [
      ("vae.frozen", DELETE),
      ("vae.vae_kl_loss_write_key", "kl"),
      ("vae.learnable_logvar", True),
      ("vae.logvar_init", -1),
      ("vae.compile_encode_fn", True),
      ("vae.force_vae_encode", False),
      (E + "enc_register_module.n_min", 1),
      (E + "enc_register_module.n_eval", 16),
      (E + "enc_register_module.size_sampling_mode", "powers_of_two"),
      (E + "enc_register_module.input_tensor_list_read_key", "vae_latents"),
      (E + "enc_seq_packer.pad_to_multiple", DELETE),
      (E + "enc_seq_packer.max_seq_len", 512),
      (E + "enc_seq_packer.return_materialized_mask", True),
      (E + "enc_transformer.drop_path_rate", 0.1),
      (E + "enc_transformer.use_act_checkpoint", True),
      (E + "enc_transformer.zero_init_query_proj", True),
      (E + "enc_transformer.intermediate_layers", [0, -1]),
      (E + "enc_transformer.intermediate_layer_write_key", "features"),
      (
        E + "enc_transformer.norm_layer",
        {
          "_target_": "flextok.model.layers.norm.Fp32LayerNorm",
          "_partial_": True,
          "bias": False,
          "elementwise_affine": False,
          "eps": 1e-5,
        },
      ),
      (E + "enc_to_latents.weight_init_style", "xavier"),
      (E + "enc_to_latents.dtype_override", "fp32"),
      (D + "dec_registers_posemb_module.posemb_type", "learnable_prod"),
      (D + "dec_patches_posemb_module.posemb_write_key", "table"),
      (D + "dec_nested_dropout.train_keep_k_write_key", None),
      (D + "dec_latent_dropout._partial_", False),
      ("regularizer.drop_quant_p", 0.5),
      ("regularizer.min_corrupt_tokens_p", 0.1),
      ("flow_matching_noise_module.noise_write_key", "noise"),
      ("flow_matching_noise_module.stratisfied", True),
      ("flow_matching_noise_module.timesteps_write_key", "t"),  # the times are also in "sigmas", see below
      ("pipeline.noise_read_key", "noise"),
      ("pipeline.latents_read_key", None),
      ("pipeline.out_channels", DELETE),
    ],
    ids=str,
  )
  def test_fields_without_effect(self, path, value):
    changes = {path: value}
    if path.endswith("timesteps_write_key"):
      changes |= {"pipeline.timesteps_read_key": "sigmas", D + "dec_time_embedder.timesteps_read_key": "sigmas"}
    assert settings(official(changes)) == OURS

  def test_latent_channels_of_a_vae_from_the_hub(self):
    """latent_channels builds the VAE only without a hub path; with one it is ignored, like its default."""
    refused("enc_patch_emb.channels_in must be 16", from_official, official({"vae.latent_channels": DELETE}))
    config = official({"vae.latent_channels": DELETE, "vae.hf_hub_path": "someone/vae"})
    assert settings(config)["vae"]["latent_channels"] == 8
