"""DreamSim against the dreamsim package under the same random weights, its resizing, its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file

from flextok_jax.models.perception import dreamsim
from flextok_jax.models.perception.vit import ViT
from flextok_jax.weights.perception.dreamsim import CONFIG, WEIGHTS, load_dreamsim
from tests.support import dreamsim_reference
from tests.support.dreamsim_reference import BACKBONE, LORA, STORED


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  path = tmp_path_factory.mktemp("dreamsim")
  dreamsim_reference.write(path)
  return load_dreamsim(path / BACKBONE, path / LORA)


@pytest.fixture
def folder(tmp_path):
  dreamsim_reference.write(tmp_path)
  return tmp_path


@pytest.fixture(scope="module")
def images():
  return np.float32(dreamsim_reference.images() / 255)


def compute(loaded, images, dtype=jnp.float32):
  """Returns distances, and embeddings of the first images."""
  sizes, params = loaded
  model = dreamsim.DreamSim(ViT(**sizes, dtype=dtype))

  @jax.jit
  def both(params, a, b):
    return model.apply({"params": params}, a, b), model.apply({"params": params}, a, method="embed")

  return both(params, *images)


@pytest.fixture(scope="module")
def computed(loaded, images):
  return compute(loaded, images)


@pytest.mark.parametrize("live", [False, True], ids=["stored", "live"])
def test_distances_and_embeddings_equal_the_package(computed, live):
  if live:
    pytest.importorskip("dreamsim", exc_type=ImportError)
    distances, embeddings = dreamsim_reference.measure()
  else:
    with np.load(STORED) as file:
      distances, embeddings = file["distances"], file["embeddings"]
  np.testing.assert_allclose(computed[0], distances, atol=2e-5)
  np.testing.assert_allclose(computed[1], embeddings, atol=1e-4)


def test_bfloat16_is_close(loaded, images, computed):
  distances, embeddings = compute(loaded, images, jnp.bfloat16)
  assert distances.dtype == embeddings.dtype == jnp.float32
  np.testing.assert_allclose(distances, computed[0], rtol=0.1)
  np.testing.assert_allclose(np.sum(embeddings * computed[1], -1), 1, atol=1e-3)


def test_gradients_of_images_that_are_not_resized(loaded):
  sizes, params = loaded
  a, b = np.random.default_rng(0).uniform(size=(2, 1, dreamsim.SIZE, dreamsim.SIZE, 3)).astype(np.float32)
  model = dreamsim.DreamSim(ViT(**sizes))
  gradients = jax.jit(jax.grad(lambda a: model.apply({"params": params}, a, b).sum()))
  assert np.isfinite(gradients(a)).all() and np.abs(gradients(a)).max() > 0 and np.abs(gradients(b)).max() < 1e-6


@pytest.mark.parametrize("shape", [(150, 280), (300, 224), (300, 300), (31, 500)])
def test_resizing_is_pillows(shape):
  picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  pillow = Image.fromarray(picture).resize((dreamsim.SIZE, dreamsim.SIZE), Image.Resampling.BICUBIC)
  resized = np.asarray(dreamsim.resize(jnp.asarray(picture[None]) / 255)[0]) * 255
  gaps = np.abs(resized - np.asarray(pillow))
  assert gaps.max() < 1.01 and (gaps > 0.01).mean() < 1e-3  # where a value lies halfway between two levels


def test_adapter_with_alpha_zero_gives_other_distances(folder, computed, images):
  """That is, the numbers above depend on the LoRA."""
  change(folder, lora_alpha=1e-6)
  distances, _ = compute(load_dreamsim(folder / BACKBONE, folder / LORA), images)
  assert np.abs(distances / computed[0] - 1).max() > 0.1


def test_bad_configurations(folder):
  for field, value, message in (
    ("r", 8, r"lora_A.weight has shape \[4, 128\], expected \[8, 128\]"),
    ("r", None, "r must be a whole number from 1 to 128, got None"),
    ("lora_alpha", -1, "lora_alpha must lie between 0 and 65536, got -1"),
    ("use_dora", True, "use_dora True is not supported, only False is"),
    ("bias", "all", "bias 'all' is not supported, only 'none' is"),
  ):
    before = change(folder, **{field: value})
    with pytest.raises(ValueError, match=message) as caught:
      load_dreamsim(folder / BACKBONE, folder / LORA)
    assert len(str(caught.value).splitlines()) == 1
    change(folder, **before)


def test_bad_weights(folder):
  path = folder / LORA / WEIGHTS
  tensors = load_file(path)
  name = next(iter(tensors))
  others = {key.replace("extractor_list.0", "extractor_list.1"): x for key, x in tensors.items()}
  for changed, message in (
    ({key: x for key, x in tensors.items() if key != name}, "lacks the tensor blocks.*lora_"),
    (tensors | {name.replace("qkv", "proj"): tensors[name]}, "has a tensor 'blocks.*attn.proj.*' that its config"),
    (tensors | others, "tunes several networks: give the LoRA of a DreamSim with one branch"),
  ):
    save_file(changed, path)
    with pytest.raises(ValueError, match=message):
      load_dreamsim(folder / BACKBONE, folder / LORA)
  path.unlink()
  with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors in .*: give a folder in peft's format"):
    load_dreamsim(folder / BACKBONE, folder / LORA)


def change(folder, **fields):
  """Changes fields of the adapter's configuration; returns what they were."""
  path = folder / LORA / CONFIG
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | fields))
  return {name: config.get(name) for name in fields}
