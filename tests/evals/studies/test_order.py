"""Ordered tokens beside a grid: measures against the API, bad input."""

import json

import jax
import numpy as np
import pytest

from flextok_jax import load, load_ar, study
from flextok_jax.core import images as images_lib
from flextok_jax.data import pipeline
from flextok_jax.stages import make_stage
from flextok_jax.stages.ar import ARStage
from flextok_jax.training import inputs
from flextok_jax.weights import fingerprints, saving
from tests.support import tiny_generators
from tests.support.commands import fails, run
from tests.support.tiny import make_params, tiny_config

GRID = dict(layout="grid", num_registers=16, levels=(8, 5, 5), nested_dropout="none")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns paths of an ordered tokenizer, a grid, and generators of their tokens."""
  folder = tmp_path_factory.mktemp("models")
  part = dict(width=32, depth=1, head_dim=16, patch_size=4)
  settings = dict(eval=dict(sources=("synthetic",), num_images=3, batch_size=3, grid_images=2))
  configs = {
    "ordered": tiny_config(**settings),
    "grid": tiny_config(tokens=GRID, decoder=part | dict(modulation="shared"), **settings),
  }
  for name, config in configs.items():
    params = make_params(make_stage(config))
    saving.save_weights(folder / name, config, params)
    ar = tiny_generators.generator_config(
      num_tokens=config.tokens.num_registers, num_classes=16, tokenizer=fingerprints.tokenizer(config, params)
    )
    saving.save_weights(folder / f"{name}_ar", ar, make_params(ARStage(ar)))
  return {path.name: str(path) for path in folder.iterdir()}


def test_measures_are_those_of_the_api(models, tmp_path):
  run(
    study,
    "--study=order",
    f"--checkpoint={models['ordered']}",
    f"--grid={models['grid']}",
    f"--generator={models['ordered_ar']}",
    f"--grid_generator={models['grid_ar']}",
    "--metrics=mse",
    f"--out={tmp_path}",
  )
  tables = {t["title"].split(":")[0]: t for t in json.loads((tmp_path / "order.json").read_text())["tables"]}
  assert list(tables) == [
    f"synthetic, {x}" for x in ("ordered", "generator of ordered tokens", "grid", "generator of grid tokens")
  ]
  for name in ("ordered", "grid"):
    model, gen = load(models[name]), load_ar(models[f"{name}_ar"])
    found = pipeline.eval_set(inputs.image_data(model.config), "synthetic", image_size=16, num_images=3)
    ids = np.asarray(model.tokenize(found["image"]))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(model.config.seed), np.arange(3))
    rows = {row[0]: row[1] for row in tables[f"synthetic, {name}"]["rows"]}
    assert list(rows) == [1, 2, 4]
    for count, value in rows.items():
      pictures = model.detokenize(ids[:, :count], key=keys)
      pixels = np.asarray(images_lib.round_to_8bit(pictures), np.float64)
      expected = 4 * np.square(pixels - found["image"] / 255).mean()  # of pixels in [-1, 1]
      np.testing.assert_allclose(value, expected, rtol=1e-4)
    logits = np.asarray(gen.logits(ids, found["label"]), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ids[..., None], -1)[..., 0]
    with np.load(tmp_path / study.PARTS / f"order_synthetic_{name}_generator.npz", allow_pickle=False) as file:
      values = json.loads(file["values"].item())
      assert file["array_samples_2"].shape == (2, 16, 16, 3)
    np.testing.assert_allclose(values["loss"], losses.mean(0), rtol=1e-4)
    assert all(x > 0 for x in values["quality"].values())
  assert (tmp_path / "order.png").stat().st_size > 0 and (tmp_path / "order_grid.png").stat().st_size > 0


def test_bad_input(models, tmp_path):
  ordered, out = f"--checkpoint={models['ordered']}", f"--out={tmp_path / 'out'}"
  fails("--study=order needs --grid, a tokenizer whose tokens are on a grid", study, ordered, "--study=order", out)
  fails(
    "must be tokenizers of ordered tokens and of a grid.* 'registers' and 'registers'",
    study,
    ordered,
    f"--grid={models['ordered']}",
    "--study=order",
    out,
  )
  wrong = f"--grid={models['grid']}", f"--grid_generator={models['ordered_ar']}"
  fails(
    "the generator was trained on ids of the tokenizer .*, but the tokenizer of --grid_generator is",
    study,
    ordered,
    *wrong,
    "--study=order",
    out,
  )
