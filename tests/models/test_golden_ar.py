"""The generator against numbers of the public PyTorch implementation: tiny models with random weights.

Tolerances: the golden set's README derives them from float64 against float32. Sampling: tests/ops/test_sampling.py.
"""

import functools
import json
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import flextok_jax
from flextok_jax.stages import make_stage
from tests.support import numpy_ar

MODELS = ("c2i_a", "c2i_b", "t2i")  # two kinds of class-conditional blocks, and text-conditional ones


def close(actual, desired, atol=1e-4):
  np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=atol)


@pytest.fixture(scope="module")
def golden(shared):
  """(model) -> (generator, recorded arrays, weights), loaded once."""

  @functools.cache
  def get(name):
    path = shared / "golden_ar" / f"ar_{name}.safetensors"
    settings = json.loads(path.with_name(f"ar_{name}_config.json").read_text())
    arrays = load_file(path.with_name(f"ar_{name}_io.safetensors"))
    return flextok_jax.load_ar(path, "float32", **settings), types.MappingProxyType(arrays), load_file(path)

  return get


def golden_batch(gen, io, conditional):
  """The recorded tokens as a batch of the stage: conditioned, or on class -1 or the empty text."""
  batch = dict(token_ids=io["tokens"], length=np.full(3, 16, np.int32), label=np.full(3, -1, np.int32))
  if gen.num_classes and conditional:
    batch["label"] = io["classes"]
  if gen.config.ar.condition == "text":
    rows = slice(0, 3) if conditional else [3, 3, 3]
    batch |= dict(text_features=io["text_emb_raw"][rows], text_lengths=io["text_len"][rows])
  return batch


@pytest.mark.parametrize("name", MODELS)
def test_import(golden, name):
  """Every tensor of the file is imported, except the fixed position table."""
  gen, _, weights = golden(name)
  ours = numpy_ar.to_official(gen.params)
  if gen.config.ar.pos_embed == "sincos1d":
    key = "models.ar_image_model.preprocessor.positional_embedding"
    close(numpy_ar.sincos(16, 128), weights[key], 1e-6)
    weights = {k: v for k, v in weights.items() if k != key}
  assert set(ours) == set(weights)
  for key, value in weights.items():
    np.testing.assert_array_equal(ours[key], value, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_logits(golden, name):
  gen, io, _ = golden(name)
  for kind in ("cond", "uncond"):
    batch = golden_batch(gen, io, kind == "cond")
    labels = batch["label"] if gen.num_classes else None
    logits = gen.logits(batch["token_ids"], labels, batch.get("text_features"), batch.get("text_lengths"))
    close(logits, io[f"logits_{kind}"])


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(golden, name):
  gen, io, _ = golden(name)
  stage = make_stage(gen.config)
  loss_fn = jax.jit(jax.value_and_grad(lambda params, batch: stage.loss_fn(params, batch, None, 0)[0]))
  close(loss_fn(gen.params, golden_batch(gen, io, False))[0], io["ce_uncond"][0])
  loss, grads = loss_fn(gen.params, golden_batch(gen, io, True))
  close(loss, io["ce_cond"][0])
  grads = numpy_ar.to_official(grads)
  norms = {k.partition(".")[2]: v for k, v in io.items() if k.startswith("gradnorm.")}
  whole = {k.partition(".")[2]: v for k, v in io.items() if k.startswith("grad.")}
  assert set(norms) == set(grads) and len(whole) == 1
  for key, norm in norms.items():
    np.testing.assert_allclose(np.linalg.norm(grads[key]), norm[0], rtol=1e-4, atol=1e-7, err_msg=key)
  for key, grad in whole.items():
    np.testing.assert_allclose(grads[key], grad, rtol=0, atol=1e-4 * np.abs(grad).max(), err_msg=key)


def test_text_projection(golden):
  gen, io, _ = golden("t2i")
  model = make_stage(gen.config).model
  text, bias = model.apply({"params": gen.params}, io["text_emb_raw"][:3], io["text_len"][:3], method="project")
  close(text, io["text_emb_projected"], 1e-5)
  np.testing.assert_array_equal(np.asarray(bias)[:, None] < -1e30, np.isneginf(io["text_mask_bias"][:, :1]))


def golden_condition(gen, io):
  if gen.num_classes:
    return dict(labels=io["classes"]), {}
  text = lambda rows: (io["text_emb_raw"][rows], io["text_len"][rows])
  given, null = text(slice(3)), text(slice(3, 4))
  return (
    dict(text_embeddings=given[0], text_lengths=given[1]),
    dict(null_text_embeddings=null[0], null_text_lengths=null[1], guidance_scale=3.0),
  )


@pytest.mark.parametrize("name", MODELS)
def test_greedy(golden, name):
  """Guided, without guidance, and from a prefix."""
  gen, io, _ = golden(name)
  given, guidance = golden_condition(gen, io)
  guidance = guidance or dict(guidance_scale=1.5)
  recorded = "greedy_clean_ids" if gen.num_classes else "greedy_reference_ids"
  np.testing.assert_array_equal(gen.generate(None, **given, **guidance, greedy=True), io[recorded])
  none = {**guidance, "guidance_scale": 1 + 1e-12}  # 1 in float32, by the program with guidance
  np.testing.assert_array_equal(gen.generate(None, **given, **none, greedy=True), io["greedy_noguidance_ids"])
  if not gen.num_classes:  # those of classes have the fault: below
    ids = gen.generate(None, **given, **guidance, greedy=True, prefix=io["tokens"][:, :4], num_tokens=12)
    np.testing.assert_array_equal(ids, io["greedy_from4_to12_ids"])


@pytest.mark.parametrize("name", MODELS)
def test_step_logits(golden, name):
  gen, io, _ = golden(name)
  given, guidance = golden_condition(gen, io)
  kind = "clean" if gen.num_classes else "reference"
  ids = io[f"greedy_{kind}_ids"]
  null = {}
  if guidance:
    null = dict(
      text_embeddings=np.repeat(guidance["null_text_embeddings"], 3, 0),
      text_lengths=np.repeat(guidance["null_text_lengths"], 3),
    )
  close(gen.logits(ids, **given), io[f"greedy_{kind}_logits_cond"])
  close(gen.logits(ids, **null), io[f"greedy_{kind}_logits_uncond"])


@pytest.mark.parametrize("name", ["c2i_a", "c2i_b"])
def test_class_guidance_with_its_fault(golden, name):
  """The authors' unconditional half is class 0 from the second step on: so their other runs come out too."""
  gen, io, _ = golden(name)
  runs = (("greedy_reference_ids", 0, 16), ("greedy_from4_to12_ids", 4, 12))
  for recorded, given, end in runs:
    ids = np.pad(io[recorded], ((0, 0), (0, 16 - end)))
    conditional, first, later = (np.asarray(gen.logits(ids, labels)) for labels in (io["classes"], None, 0))
    unconditional = np.where(np.arange(16)[:, None] == given, first, later)
    if not given:
      close(conditional, io["greedy_reference_logits_cond"])
      close(unconditional, io["greedy_reference_logits_uncond"])
    chosen = (unconditional + 1.5 * (conditional - unconditional)).argmax(-1)
    np.testing.assert_array_equal(chosen[:, given:end], ids[:, given:end])
    np.testing.assert_array_equal(ids[:, :given], io["tokens"][:, :given])
