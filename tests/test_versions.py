"""One short run from training to inference; launch/test.sh runs it and other fast tests on every Python version."""

import jax
import numpy as np

import flextok_jax
from flextok_jax.config import load_config
from tests.support.commands import ROOT


def test_train_load_and_use(tmp_path):
  from flextok_jax import train  # imported late because it defines flags

  config = load_config("debug")
  config.train.update(num_steps=3, log_every=1, checkpoint_every=2)
  config.optim.warmup_steps = 1
  config.eval.update(num_images=2, num_tokens=(4,), batch_size=2)
  train.train(config, str(tmp_path))
  model = flextok_jax.load(str(tmp_path / "weights.safetensors"))
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  ids = model.tokenize(images)
  assert ids.shape == (2, 4)
  pixels = model.detokenize(ids, 2, key=jax.random.key(0))
  assert pixels.shape == images.shape and bool(np.isfinite(pixels).all())


def test_shipped_models():
  folder = ROOT / "flextok_jax" / "assets"
  generator = flextok_jax.load_ar(str(folder / "shapes_ar.safetensors"))
  ids = generator.generate(jax.random.key(0), [0, 5])
  model = flextok_jax.load(str(folder / "shapes.safetensors"))
  pixels = np.asarray(model.detokenize(ids, key=jax.random.key(1)))
  assert pixels.shape == (2, 32, 32, 3) and pixels.std() > 0.1  # not a single colour
