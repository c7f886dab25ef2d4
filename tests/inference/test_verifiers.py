"""Verifiers with networks, against the networks of evaluation; references; files of heads; bad input."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flextok_jax.inference import batches, verifiers
from flextok_jax.inference.search import Candidates
from flextok_jax.parallel import sharding
from flextok_jax.weights.perception import networks
from tests.support import clip_reference, vit_reference

PROMPTS = ["red bee", "ace", "red bee"]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  monkeypatch.setattr(batches, "local_mesh", lambda: mesh)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  folder = tmp_path_factory.mktemp("weights")
  for name, reference, case in (
    ("classifier", vit_reference, "registers"),
    ("dinov2", vit_reference, "registers"),
    ("clip", clip_reference, "laion"),
  ):
    (folder / name).mkdir()
    reference.write(case, folder / name)
  clip_reference.write_tokenizer(folder / "clip")
  return folder


@pytest.fixture(scope="module")
def candidates():
  images = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
  zeros = np.zeros(3)
  return Candidates(np.zeros((3, 2), int), images, PROMPTS, np.array([1, 0, 2]), np.array([0, 1, 0]), zeros, zeros)


def make(name, weights, **more):
  return verifiers.make(name, weights=str(weights), **more)


def unit(candidates):
  return (candidates.images + 1) / 2


def test_clip_and_aesthetic(weights, candidates, tmp_path):
  images, texts = networks.clip(str(weights), "clip")
  features = np.asarray(images(unit(candidates)))
  expected = (features * texts(PROMPTS)).sum(1)
  np.testing.assert_allclose(make("clip", weights)(candidates), expected, atol=1e-5)

  rng, width = np.random.default_rng(1), features.shape[1]
  layers = {0: (8, width), 2: (1, 8)}
  head = {f"layers.{i}.weight": rng.normal(size=shape).astype(np.float32) for i, shape in layers.items()}
  head |= {f"layers.{i}.bias": rng.normal(size=shape[0]).astype(np.float32) for i, shape in layers.items()}
  for name in ("clip", "aesthetic"):
    assert name in networks.SOURCES
  (tmp_path / "clip").symlink_to(weights / "clip")
  save_file(head, tmp_path / "aesthetic.safetensors")
  hidden = features @ head["layers.0.weight"].T + head["layers.0.bias"]
  expected = (hidden @ head["layers.2.weight"].T + head["layers.2.bias"])[:, 0]
  np.testing.assert_allclose(make("aesthetic", tmp_path)(candidates), expected, atol=1e-4)
  for wrong, words in (
    ({"other": head["layers.0.bias"]}, "'other' is no tensor of a linear head"),
    ({"weight": head["layers.0.weight"]}, r"layer 0 needs a weight \[out, in\] and a bias"),
    ({k: v for k, v in head.items() if ".0." in k}, "the last layer of a head must return one score"),
    (head | {"layers.2.weight": np.zeros((1, 5), np.float32)}, "layer 2 takes 5 features, not 8"),
  ):
    save_file(wrong, tmp_path / "aesthetic.safetensors")
    with pytest.raises(ValueError, match=words):
      make("aesthetic", tmp_path)


def test_top1_is_the_chance_of_the_asked_class(weights, candidates):
  logits = np.asarray(networks.classifier(str(weights), "top1")(unit(candidates)), np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  np.testing.assert_allclose(make("top1", weights)(candidates), log_probs[np.arange(3), [1, 0, 2]], atol=1e-4)


def test_references(weights, candidates):
  references = np.random.default_rng(2).integers(0, 256, (2, 32, 32, 3), np.uint8)
  of_each = references[[0, 1, 0]] / 255
  expected = -10 * np.log10(np.square(unit(candidates) - of_each).mean((1, 2, 3)))
  np.testing.assert_allclose(make("psnr", weights, references=references)(candidates), expected, rtol=1e-5)
  cosine = networks.similarity(str(weights))(unit(candidates), np.float32(of_each))
  np.testing.assert_allclose(make("dinov2", weights, references=references)(candidates), cosine, atol=1e-5)
  with pytest.raises(ValueError, match="1 references are fewer than the prompts: give one for each"):
    make("psnr", weights, references=references[:1])(candidates)
  with pytest.raises(ValueError, match=r"references must be images \[prompts, h, w, 3\], got shape \[32, 32, 3\]"):
    make("psnr", weights, references=references[0])


@pytest.mark.parametrize("name", ["clip", "aesthetic", "top1", "lpips", "dreamsim", "dinov2"])
def test_a_missing_network_is_named(name, tmp_path):
  references = np.zeros((1, 8, 8, 3), np.uint8)
  with pytest.raises(ValueError, match="has no .*put there") as error:
    make(name, tmp_path, references=references)
  assert "\n" not in str(error.value)


def test_facts_that_a_verifier_needs(weights, candidates):

  for name, lacks, words in (("clip", "prompts", "give prompts"), ("top1", "labels", "give labels")):
    with pytest.raises(ValueError, match=words):
      make(name, weights)(dataclasses.replace(candidates, **{lacks: None}))
  with pytest.raises(ValueError, match="verifier 'scenes' reads captions: give prompts"):
    verifiers.make("scenes")(dataclasses.replace(candidates, prompts=None))
  for names, more, words in (
    (["clip"], dict(ensemble="mean"), "ensemble='mean' must be one of rank, weighted"),
    ({"likelihood": float("nan")}, {}, "an ensemble of 1 verifiers needs as many finite weights"),
    ([], {}, "an ensemble of 0 verifiers"),
  ):
    with pytest.raises(ValueError, match=words):
      make(names, weights, **more)
