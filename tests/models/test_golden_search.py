"""Beams and scores of the public search classes, exactly."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import flextok_jax
from flextok_jax.inference import batches
from flextok_jax.parallel import sharding
from tests.conftest import SHARED

pytestmark = pytest.mark.skipif(SHARED is None, reason="needs the golden set, ../shared/golden_search")
RUNS = ("beam_table", "beam_linear", "beam_likelihood", "lookahead_table", "lookahead_full")


@pytest.fixture(scope="module")
def generator():
  path = SHARED / "golden_ar" / "ar_t2i.safetensors"
  settings = json.loads((SHARED / "golden_ar" / "ar_t2i_config.json").read_text())
  return flextok_jax.load_ar(path, "float32", **settings), load_file(SHARED / "golden_ar" / "ar_t2i_io.safetensors")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Eight virtual devices would search for eight prompts."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  monkeypatch.setattr(batches, "local_mesh", lambda: mesh)


def table(recorded):
  def score(candidates):
    places = recorded["position_weights"][: candidates.ids.shape[1]]
    return (recorded["score_table"][candidates.ids] * places).sum(1)

  score.needs_images = False
  return score


@pytest.mark.parametrize("run", RUNS)
def test_beams(generator, run):
  """All prompts at once; the public classes run one after another."""
  gen, io = generator
  recorded = load_file(SHARED / "golden_search" / "search_io.safetensors")
  meta = json.loads((SHARED / "golden_search" / "search_meta.json").read_text())[run]
  assert set(meta) <= {
    "verifier", "beam_width", "candidates_per_beam", "token_schedule", "tokens_per_step", "max_steps",
    "lookahead_number",
  }  # fmt: skip
  more = {name: meta[name] for name in ("tokens_per_step",) if name in meta}
  if "max_steps" in meta:
    more["steps"] = meta["max_steps"]
  if "lookahead_number" in meta:
    more |= dict(algorithm="lookahead", lookahead=meta["lookahead_number"])
  result = gen.search(
    None,
    verifier=table(recorded) if meta["verifier"] == "Table" else "step_likelihood",
    text_embeddings=io["text_emb_raw"][:3],
    text_lengths=io["text_len"][:3],
    null_text_embeddings=io["text_emb_raw"][3:],
    null_text_lengths=io["text_len"][3:],
    guidance_scale=3.0,
    greedy=True,
    branching="last",
    beam_width=meta["beam_width"],
    candidates=meta["candidates_per_beam"],
    schedule=meta["token_schedule"],
    **more,
  )
  assert result.images is None and result.decoded == 0
  for p in range(3):
    name = f"{run}.p{p}"
    steps = [k for k in recorded if k.startswith(f"{name}.step") and k.endswith(".beams")]
    assert len(steps) == len(result.steps) == len(recorded[f"{name}.step_scores"])
    for i, step in enumerate(result.steps):
      np.testing.assert_array_equal(step.ids[p], recorded[f"{name}.step{i}.beams"])
      np.testing.assert_allclose(step.scores[p, 0], recorded[f"{name}.step_scores"][i], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(result.ids[p], recorded[f"{name}.best"])
