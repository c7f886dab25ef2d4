"""LPIPS against the lpips package under the same random weights, its gradients, its files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flextok_jax.models.perception import lpips
from flextok_jax.weights.perception.lpips import load_lpips
from tests.support import lpips_reference
from tests.support.lpips_reference import STEP, STORED


@pytest.fixture(scope="module", params=list(lpips.NETS))
def net(request):
  return request.param


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
  """Has backbone.safetensors and heads.safetensors."""
  path = tmp_path_factory.mktemp(net)
  backbone, heads = lpips_reference.weights(net)
  save_file(backbone | {"classifier.1.weight": np.zeros((2, 2), np.float32)}, path / "backbone.safetensors")
  save_file(heads, path / "heads.safetensors")
  return path


@pytest.fixture(scope="module")
def params(net, folder):
  found, params = load_lpips(folder / "backbone.safetensors", folder / "heads.safetensors")
  assert found == net
  return params


@functools.partial(jax.jit, static_argnums=(0, 4))
def compute(net, params, a, b, dtype=jnp.float32):
  """Returns distances, and the gradients of their sum in a."""
  distances, pull = jax.vjp(lambda a: lpips.LPIPS(net, dtype).apply({"params": params}, a, b), a)
  return distances, pull(jnp.ones_like(distances))[0]


@pytest.fixture(scope="module")
def computed(net, params):
  return compute(net, params, *lpips_reference.images())


@pytest.mark.parametrize("live", [False, True], ids=["stored", "live"])
def test_distances_and_gradients_equal_the_package(net, computed, live):
  if live:
    pytest.importorskip("lpips", exc_type=ImportError)
    distances, gradients = lpips_reference.distances(net)
  else:
    with np.load(STORED) as file:
      distances, gradients = file[f"{net}/distances"], file[f"{net}/gradients"]
  np.testing.assert_allclose(computed[0], distances, rtol=1e-5)
  atol = 1e-4 * np.abs(gradients).max()
  np.testing.assert_allclose(np.asarray(computed[1])[:, ::STEP, ::STEP], gradients, rtol=1e-3, atol=atol)


def test_bfloat16_is_close(net, params, computed):
  distances, gradients = compute(net, params, *lpips_reference.images(), jnp.bfloat16)
  assert distances.dtype == gradients.dtype == np.float32
  np.testing.assert_allclose(distances, computed[0], rtol=0.02)
  cosine = np.vdot(gradients, computed[1]) / np.linalg.norm(gradients) / np.linalg.norm(computed[1])
  assert cosine > 0.98


def test_dead_features_have_finite_gradients(net, params):
  """Where every channel is 0, the package's gradients are NaN."""
  dead = jax.tree_util.tree_map_with_path(lambda path, x: x - 100 * (path[-1].key == "bias"), params)
  a, b = lpips_reference.images()
  distances, gradients = compute(net, dead, a, b)
  assert not distances.any() and not gradients.any()


def test_equal_images_and_order(net, params, computed):
  a, b = lpips_reference.images()
  assert np.abs(compute(net, params, a, a)[0]).max() < 1e-12
  np.testing.assert_allclose(compute(net, params, b, a)[0], computed[0], rtol=1e-5)


def test_whole_module_in_one_file(net, params, tmp_path):
  """As numpy.savez writes lpips.LPIPS(...).state_dict()."""
  backbone, heads = lpips_reference.weights(net)
  tensors = {"scaling_layer.shift": np.zeros(3), **heads}
  tensors |= {name.replace("lin", "lins."): x for name, x in heads.items()}
  for scale, (_, convolutions) in enumerate(lpips.NETS[net]):
    for index, *_ in convolutions:
      for kind in ("weight", "bias"):
        tensors[f"net.slice{scale + 1}.{index}.{kind}"] = backbone[f"features.{index}.{kind}"]
  np.savez(tmp_path / "whole.npz", **tensors)
  found, again = load_lpips(tmp_path / "whole.npz")
  assert found == net
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_bad_files(folder, net, tmp_path):
  backbone, heads = folder / "backbone.safetensors", folder / "heads.safetensors"
  with pytest.raises(ValueError, match=r"backbone.safetensors lacks the tensor lin0.model.1.weight \(and 4 more\)"):
    load_lpips(backbone)
  with pytest.raises(ValueError, match="neither AlexNet's nor VGG16's: features.0.weight has shape"):
    load_lpips(heads)
  with pytest.raises(FileNotFoundError, match="no such file: .*none.npz"):
    load_lpips(backbone, tmp_path / "none.npz")
  other = next(name for name in lpips.NETS if name != net)
  save_file(lpips_reference.weights(other)[1], tmp_path / "other.safetensors")
  with pytest.raises(ValueError, match="lin1.model.1.weight has shape .* expected"):
    load_lpips(backbone, tmp_path / "other.safetensors")


def test_bad_input(net):
  side = lpips.MIN_SIDES[net]
  shape = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  init = lambda net, shape: jax.eval_shape(lpips.LPIPS(net).init, jax.random.key(0), shape, shape)
  assert init(net, shape)
  with pytest.raises(ValueError, match=f"needs images of {side} px per side or more, got {side - 1}x{side}: resize"):
    init(net, jax.ShapeDtypeStruct((1, side - 1, side, 3), jnp.float32))
  with pytest.raises(ValueError, match="unknown net 'squeeze': one of alex, vgg"):
    init("squeeze", shape)
