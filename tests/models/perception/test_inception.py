"""The FID's InceptionV3 against features of pytorch-fid and torch-fidelity, stored ones and live; its benchmark."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import benchmark_features
from flextok_jax.models.perception.inception import FIDInception, resize_images
from flextok_jax.weights.perception import inception as inception_files
from tests.support import torch_inception
from tests.support.commands import fails, run


@pytest.fixture(scope="module")
def tensors():
  return benchmark_features.random_tensors(torch_inception.SEED)


@pytest.fixture(scope="module")
def stored():
  with np.load(torch_inception.FEATURES) as file:
    return dict(file)


def features(tensors, resize, images):
  params = inception_files.from_official("weights", tensors)
  run = jax.jit(FIDInception(resize).apply)
  return jax.tree.map(np.asarray, run({"params": params}, images / np.float32(255)))


def fid(one, other):
  """For a few features [n, d] each: the root of the d x d product from the singular values of an n x n matrix."""
  mean = one.mean(0) - other.mean(0)
  one, other = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one.astype(np.float64), other.astype(np.float64)))
  return mean @ mean + (one**2).sum() + (other**2).sum() - 2 * np.linalg.svd(one @ other.T, compute_uv=False).sum()


def test_features_of_pytorch_fid(tensors, stored):
  got, want = features(tensors, "pytorch", torch_inception.some_images())["pool"], stored["pytorch_pool"]
  assert want.std() > 0.1 and np.abs(want[0] - want[-1]).max() > 0.1
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  assert fid(got[:3], got[3:]) == pytest.approx(fid(want[:3], want[3:]), rel=1e-3)


def test_features_of_torch_fidelity(tensors, stored):
  got = features(tensors, "tensorflow", torch_inception.some_images()[[0, -1]])
  assert {name: x.shape for name, x in got.items()} == {"pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)}
  for name, x in got.items():
    assert x.dtype == np.float32 and stored[name].std() > 0.1
    np.testing.assert_allclose(x, stored[name], rtol=0, atol=1e-4)
  assert np.abs(got["pool"][0] - stored["pytorch_pool"][0]).max() > 1e-2  # the other way of resizing differs clearly


def test_the_original_networks_still_give_the_stored_features(stored):
  for name in ("torch", "pytorch_fid", "torch_fidelity"):
    pytest.importorskip(name, reason=f"{name} is not installed: the stored features stand for what it computes")
  found = torch_inception.originals()
  assert found.keys() == stored.keys()
  for name, x in found.items():
    np.testing.assert_allclose(x, stored[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("resize", ["tensorflow", "pytorch"])
def test_resize_is_its_definition(resize):
  images = np.random.default_rng(0).random((2, 41, 420, 3), np.float32)
  want = images.astype(np.float64)
  for axis in (1, 2):
    size = want.shape[axis]
    at = [i * size / 299 if resize == "tensorflow" else max((i + 0.5) * size / 299 - 0.5, 0) for i in range(299)]
    pick = lambda i: np.take(want, min(i, size - 1), axis)  # noqa: B023 used only here
    want = np.stack([(1 - x % 1) * pick(int(x)) + x % 1 * pick(int(x) + 1) for x in at], axis)
  np.testing.assert_allclose(resize_images(images, resize), want, atol=1e-4)
  same = np.random.default_rng(0).random((1, 299, 299, 3), np.float32)
  np.testing.assert_array_equal(resize_images(same, resize), same)


def test_unknown_resize():
  with pytest.raises(ValueError, match="unknown resize 'lanczos': use one of tensorflow, pytorch"):
    jax.eval_shape(FIDInception("lanczos").init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_a_file_of_weights(tensors, tmp_path):
  """PyTorch's BatchNorm counters are ignored; missing or unknown tensors and wrong shapes are named."""
  path = tmp_path / "weights.safetensors"
  save_file({**tensors, "Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}, path)
  jax.tree.map(
    np.testing.assert_array_equal, inception_files.load_inception(path), inception_files.from_official("", tensors)
  )
  name = "Mixed_7c.branch3x3_2a.bn.running_var"
  for change, words in (
    ({name: None}, f"lacks the tensor {name}"),
    ({"Mixed_9.conv.weight": tensors[name]}, "has a tensor 'Mixed_9.conv.weight'"),
    ({name: tensors[name][1:]}, rf"{name} has shape \[383\], expected \[384\]"),
  ):
    changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=f"^weights.npz.*{words}"):
      inception_files.from_official("weights.npz", changed)
  without_bias = {k: v for k, v in tensors.items() if k != "fc.bias"}  # unused
  inception_files.from_official("weights.npz", without_bias)
  with pytest.raises(FileNotFoundError, match="no such file"):
    inception_files.load_inception(tmp_path / "none.npz")


# The benchmark.


def test_benchmark_without_pytorch(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "pytorch_fid", None)
  monkeypatch.setattr(benchmark_features, "jax_features", lambda tensors, images: lambda: images[:, 0, 0])
  out = tmp_path / "features.jsonl"
  run(benchmark_features, "--batch=2", "--size=8", "--rounds=3", f"--out={out}")
  printed = capsys.readouterr().out
  assert "no comparison with PyTorch" in printed and "pip install torch" in printed
  assert "2 images of 8 px per batch on cpu" in printed
  (row,) = map(json.loads, out.read_text().splitlines())
  assert row["way"] == "jax" and len(row["images_per_second"]) == 3 and row["gap"] == 0


def test_benchmark_compares(capsys):
  ways = {"jax": lambda: np.zeros(3), "pytorch": lambda: np.array([0, -0.5, 0.25])}
  rows = benchmark_features.measure(ways, 4, 2)
  assert [row["way"] for row in rows] == ["jax", "pytorch"] and [row["gap"] for row in rows] == [0, 0.5]
  rows[0]["images_per_second"], rows[1]["images_per_second"] = [30.0, 40.0], [20.0, 10.0]
  line = benchmark_features.format_report(rows, "title").splitlines()[-1].split()
  assert line[:6] == ["pytorch", "15", "(10", "..", "20)", "2.75"]


def test_benchmark_refuses():
  fails("--rounds=0 must be at least 1", benchmark_features, "--rounds=0")
