"""Starting a run from existing weights."""

import jax
import numpy as np

from flextok_jax.training import warm_start
from flextok_jax.weights import loading, saving
from tests.support.runs import assert_trees_equal, config_of, fails, random_state

VAE = dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(4,), layers_per_block=1, norm_groups=2)


def test_check_params_reports_the_first_mismatch():
  want = {"a": {"x": np.zeros(2), "y": np.zeros((3, 4))}, "b": {"z": np.zeros(1)}}
  warm_start.check_params(want, want, "here")
  less, more = {"a": {"x": np.zeros(2)}, "b": want["b"]}, {**want, "c": {"w": np.zeros(1)}}
  other = {"a": {"x": np.zeros(2), "y": np.zeros((4, 3))}, "b": {"z": np.zeros(7)}}
  fails("here lacks the array a/y", warm_start.check_params, less, want, "here")
  fails("here has an array c/w that", warm_start.check_params, more, want, "here")
  fails(r"here: a/y has shape \(4, 3\), .*\(3, 4\)", warm_start.check_params, other, want, "here")


def test_warm_start(tmp_path):
  config = config_of()
  state, given = random_state(config, 0), random_state(config, 0, seed=1)
  path = str(tmp_path / "weights.safetensors")
  saving.save_weights(path, config, given.params)
  warm = warm_start.warm_start(state, loading.load(path)[1], path)
  assert_trees_equal(warm.params, given.params)
  assert_trees_equal(warm.ema, given.params)
  assert_trees_equal(warm.opt_state, state.opt_state)
  pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((warm.params, warm.ema))}
  assert len(pointers) == 2 * len(jax.tree.leaves(warm.params))  # donated later, so no buffer may be shared

  # With a VAE: the frozen part is required, encoder and decoder may stay random; all shapes must match.
  over_vae = config_of(vae=VAE)
  state, vae_config = random_state(over_vae, 0), config_of(stage="vae", vae=VAE)
  vae = random_state(vae_config, 0, seed=2).params
  saving.save_weights(path, vae_config, vae)
  warm = warm_start.warm_start(state, loading.load(path)[1], path)
  assert_trees_equal(warm.frozen, vae)
  assert_trees_equal(warm.params, state.params)
  other = config_of(stage="vae", vae=VAE | dict(latent_channels=8))
  saving.save_weights(path, other, random_state(other, 0).params)
  fails(f"{path}: vae/.* has shape .*, its config asks for", warm_start.warm_start, state, loading.load(path)[1], path)
  saving.save_weights(path, config, given.params)
  fails("init_from=.* holds decoder, encoder; needed: vae", warm_start.warm_start, state, loading.load(path)[1], path)
