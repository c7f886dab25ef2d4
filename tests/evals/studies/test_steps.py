"""Decoders with fewer steps: measures against numpy, an untrained student beside its teacher, bad input."""

import json

import jax
import numpy as np
import pytest

from flextok_jax import study
from flextok_jax.config import with_fields
from flextok_jax.evals.studies import steps
from flextok_jax.ops import distances
from flextok_jax.stages import make_stage
from flextok_jax.weights import fingerprints, saving
from tests.support.commands import fails, run
from tests.support.tiny import make_params, tiny_config

RNG = np.random.default_rng(0)


def test_measures():
  a, b = RNG.integers(0, 256, (2, 3, 4, 8, 8, 3)).astype(np.uint8)
  scaled = lambda x: x / 127.5 - 1
  np.testing.assert_allclose(steps.mse(a, b), np.square(scaled(a) - scaled(b)).mean(), rtol=1e-5)
  pairs = [np.square(scaled(a[:, i]) - scaled(a[:, j])).mean() for i in range(4) for j in range(i)]
  np.testing.assert_allclose(steps.between_decodes(a), np.mean(pairs), rtol=1e-5)
  x = a.astype(int)
  across = np.abs(x[..., 1:, :] - x[..., :-1, :]).mean(), np.abs(x[..., 1:, :, :] - x[..., :-1, :, :]).mean()
  np.testing.assert_allclose(steps.detail(a), np.mean(across), rtol=1e-6)
  assert steps.detail(np.full_like(a, 7)) == 0


def test_statistics_of_images():
  """Of a constant image: its colour at every scale and no structure; blurring shrinks the deviations of details."""
  images = np.full((2, 32, 32, 3), 0.5, np.float32)
  images[..., 2] = -0.5
  found = np.asarray(distances.statistics(images)).reshape(2, 3, 2, 18)  # scales, mean and deviation, channels
  np.testing.assert_allclose(found[:, :, 0, :3], np.broadcast_to([1 / 6, 0, -0.5], (2, 3, 3)), atol=1e-6)
  assert np.abs(found[:, :, 0, 3:]).max() < 1e-6 and np.abs(found[:, :, 1]).max() < 1e-3
  noise = RNG.normal(0, 0.5, (16, 32, 32, 3)).astype(np.float32)
  blurred = noise.reshape(16, 16, 2, 16, 2, 3).mean((2, 4)).repeat(2, 1).repeat(2, 2)
  sharp, soft = (np.asarray(distances.statistics(x)).reshape(16, 3, 2, 18)[:, 0, 1].mean(0) for x in (noise, blurred))
  assert (soft < sharp).all()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns a teacher, its untrained student, and another tokenizer."""
  root = tmp_path_factory.mktemp("models")
  data = dict(sources=dict(synthetic=dict(weight=1.0, render_size=32), tfds=dict(weight=0.0)))
  config = tiny_config(data=data, eval=dict(sources=("synthetic",), num_tokens=(1, 4), num_images=3, batch_size=6))
  params = make_params(make_stage(config))
  fields = {"stage": "distill", "decoder.interval": True, "distill.steps": (1, 2)}
  fields |= {f"distill.sampler.{name}": value for name, value in config.sampler.items()}
  student = with_fields(config, fields | {"distill.teacher": fingerprints.tokenizer(config, params, decoder=True)})
  embed = make_params(make_stage(student))["decoder"]["interval_embed"]
  embed["out"] = jax.tree.map(np.zeros_like, embed["out"])  # as it starts
  of_student = {**params, "decoder": {**params["decoder"], "interval_embed": embed}}
  paths = {name: str(root / f"{name}.safetensors") for name in ("teacher", "student", "other")}
  saving.save_weights(paths["teacher"], config, params)
  saving.save_weights(paths["student"], student, of_student)
  other = {**params, "decoder": jax.tree.map(lambda x: 1.5 * x, params["decoder"])}
  saving.save_weights(paths["other"], config, other)
  return paths


def test_an_untrained_student_beside_its_teacher(models, tmp_path):
  """Without guidance it is the teacher: the same pictures at the teacher's two steps, others in one step."""
  given = f"--checkpoint={models['student']}", "--study=steps", "--num_decodes=2", "--metrics=mse"
  run(study, *given, f"--teacher={models['teacher']}", "--step_counts=2,1", f"--out={tmp_path}")
  tables = json.loads((tmp_path / "steps.json").read_text())["tables"]
  assert [t["title"].split(",")[0] for t in tables] == ["synthetic: 1 token", "synthetic: 4 tokens"]
  for count, found in zip((1, 4), tables):
    rows = {row[0]: dict(zip(found["columns"][1:], row[1:])) for row in found["rows"]}
    assert list(rows) == ["teacher 2", "teacher 1", "student 1", "student 2"]
    assert [row["evaluations"] for row in rows.values()] == [2, 1, 1, 2]
    assert rows["teacher 2"]["fidelity"] == 0 and rows["teacher 2"]["variation"] == pytest.approx(1)
    assert rows["student 2"]["fidelity"] < 1e-3 and rows["student 1"]["fidelity"] > 1e-3
    assert rows["student 1"]["fidelity"] == pytest.approx(rows["teacher 1"]["fidelity"], rel=0.02)
    with np.load(tmp_path / study.PARTS / f"steps_synthetic_{count}_student_1.npz", allow_pickle=False) as file:
      decodes = file["array_decodes"]
    with np.load(tmp_path / study.PARTS / f"steps_synthetic_{count}_teacher_2.npz", allow_pickle=False) as file:
      reference = file["array_decodes"]
    assert decodes.shape == (3, 2, 16, 16, 3)
    ratio = steps.between_decodes(decodes) / steps.between_decodes(reference)
    assert rows["student 1"]["variation"] == pytest.approx(ratio, rel=1e-5)
    fidelity = steps.mse(decodes, reference) / steps.between_decodes(reference)
    assert rows["student 1"]["fidelity"] == pytest.approx(fidelity, rel=1e-5)
    assert all(row["Fréchet"] > 0 and row["ms per image"] > 0 for row in rows.values())
  assert (tmp_path / "steps.png").stat().st_size > 0 and (tmp_path / "steps_grid.png").stat().st_size > 0


def test_bad_input(models, tmp_path):
  out = f"--out={tmp_path / 'out'}"
  student, teacher = f"--checkpoint={models['student']}", f"--checkpoint={models['teacher']}"
  fails("needs --teacher, the tokenizer it was distilled from", study, student, "--study=steps", out)
  fails("is not a student: leave --teacher out", study, teacher, "--study=steps", f"--teacher={models['teacher']}", out)
  wrong = f"--teacher={models['other']}"
  fails(
    "fingerprint .{16}, but the student at .* is of teacher .{16}: give that",
    study,
    student,
    "--study=steps",
    wrong,
    out,
  )
  fails("--teacher is a flag of the study steps: name it in --study", study, student, "--study=tokens", wrong, out)
