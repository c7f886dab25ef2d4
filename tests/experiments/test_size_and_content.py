"""Tokens for a fixed quality by size and content, of a tiny random tokenizer."""

import json

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from experiments import size_and_content
from flextok_jax.config import load_config
from flextok_jax.data import transforms
from flextok_jax.stages import make_stage
from flextok_jax.weights import loading, saving
from tests.support.commands import fails, run
from tests.support.tiny import make_params, tiny_config

SCALED = dict(width=32, depth=1, head_dim=16, patch_size=4, posemb_scaling="scaled")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "weights.safetensors"
  source = dict(synthetic=dict(weight=1.0, style="plain"))
  config = tiny_config(encoder=SCALED, decoder=SCALED, data=dict(sources=source))
  saving.save_weights(str(path), config, make_params(make_stage(config)))
  return path


def measured(checkpoint, out, quality, *given):
  flags = f"--quality={quality}", "--sizes=8,16", "--num_images=12", "--decoder_steps=1", *given
  run(size_and_content, f"--checkpoint={checkpoint}", f"--out={out}", *flags)
  return json.loads((out / "lengths.json").read_text())


def test_lengths_at_the_two_extremes(checkpoint, tmp_path, capsys):
  all_good = measured(checkpoint, tmp_path / "good", 1e6)
  assert all_good["mean_tokens"] == {size: {str(n): [1, 1, 1] for n in range(1, 7)} for size in ("8", "16")}
  assert all_good["within"] == {"8": 1, "16": 1} and all_good["pictures"] == 12
  assert all_good["share_of_variance"] == {"size": 0, "objects": 0}
  none_good = measured(checkpoint, tmp_path / "bad", 1e-9, "--at=8")
  assert none_good["mean_tokens"]["16"]["6"] == [4, 4, 4] and none_good["within"] == {"8": 0, "16": 0}
  out = capsys.readouterr().out
  assert "objects       8 px      16 px" in out and "of the variance of the number of tokens" in out
  assert Image.open(tmp_path / "good" / "lengths.png").width > 800


def test_scenes_are_balanced_and_the_same_at_all_sizes():
  scenes, objects = size_and_content.draw_scenes(2, 64, "plain")
  assert objects.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6] and scenes.shape == (12, 64, 64, 3)
  small = np.stack([transforms.center_crop(scene, 16) for scene in scenes])
  blocks = scenes.reshape(12, 16, 4, 16, 4, 3).mean((2, 4))
  assert np.abs(small - blocks).mean() < 6


def test_glyphs_are_ordered_by_their_edges(tmp_path):
  (tmp_path / "flat").mkdir()
  for code in range(0x1F400, 0x1F440):  # animals; some are held out
    stripes = np.zeros((32, 32, 4), np.uint8) + (0, 0, 0, 255)
    stripes[:, np.arange(32) // (2 + code % 5) % 2 == 1, :3] = 255
    Image.fromarray(stripes.astype(np.uint8)).save(tmp_path / "flat" / f"{code:x}.png")
  glyphs, levels = size_and_content.draw_glyphs(2, 64, str(tmp_path))
  assert levels.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6] and glyphs.shape == (12, 64, 64, 3)
  contrast = np.abs(np.diff(glyphs.astype(float), axis=2)).mean((1, 2, 3))
  assert np.diff(contrast).min() > -0.5 and contrast[-1] > contrast[0] + 5


def test_pictures_are_compared_at_a_size():
  a, b = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8, 3)).at[:, ::2].set(1.0).at[:, 1::2].set(-1.0)
  assert size_and_content.distance_at(0)(a, b) == 1 and size_and_content.distance_at(4)(a, b) < 0.1


def test_shares_of_variance():
  lengths, sizes = np.array([1, 1, 3, 3]), np.array([8, 8, 16, 16])
  assert size_and_content.explained(lengths, sizes) == 1
  assert size_and_content.explained(lengths, np.array([1, 2, 1, 2])) == 0
  assert size_and_content.explained(np.array([1, 2, 3, 4]), sizes) == pytest.approx(0.8)


@pytest.mark.parametrize(("name", "multiple", "latents", "shift"), [("shapes", 8, 96, 3), ("glyphs", 16, 24, 1.5)])
def test_the_config_of_the_experiment_starts_as_the_shipped_tokenizer(name, multiple, latents, shift):
  config = load_config(f"{name}:mixed")
  stage = make_stage(config)  # all shapes fit
  assert stage.model.patch_multiple == multiple and stage.model.t_shift(latents, latents) == shift
  shipped = loading.load(name)[0]
  same = ("width", "depth", "head_dim", "patch_size", "posemb", "max_grid")
  assert all(config[part][name] == shipped[part][name] for part in ("encoder", "decoder") for name in same)
  assert (config.image_size, config.tokens.levels) == (shipped.image_size, shipped.tokens.levels)


def test_bad_input_is_one_line(checkpoint, tmp_path):
  given = f"--checkpoint={checkpoint}", f"--out={tmp_path}"
  fails("--quality is missing", size_and_content, *given)
  fails("10", size_and_content, *given, "--quality=1", "--sizes=8,10")
