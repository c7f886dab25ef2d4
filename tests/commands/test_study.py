"""The study command on tiny random models."""

import json
import re

import jax
import numpy as np
from PIL import Image
import pytest

from flextok_jax import load, study
from flextok_jax.core import images as images_lib
from flextok_jax.data import pipeline
from flextok_jax.parallel import batching
from flextok_jax.stages import make_stage
from flextok_jax.stages.ar import ARStage
from flextok_jax.training import inputs
from flextok_jax.weights import fingerprints, saving
from tests.support import tiny_generators
from tests.support.commands import fails, run
from tests.support.tiny import make_params, tiny_config


def mse(a, b):
  return np.square((a.astype(float) - b) / 255).mean((-1, -2, -3))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns paths of a tokenizer (16 px, 4 registers, 200 codes) and of conditional and unconditional generators."""
  folder = tmp_path_factory.mktemp("models")
  config = tiny_config(eval=dict(sources=("synthetic",), num_images=5, batch_size=3, grid_images=2))
  params = make_params(make_stage(config))
  saving.save_weights(folder / "tokenizer", config, params)
  for name in ("class", "none"):
    ar = tiny_generators.generator_config(condition=name, tokenizer=fingerprints.tokenizer(config, params))
    saving.save_weights(folder / name, ar, make_params(ARStage(ar)))
  return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def args(models):
  return (f"--checkpoint={models['tokenizer']}", "--metrics=psnr,mse", "--num_decodes=3")


@pytest.fixture(scope="module")
def out(args, tmp_path_factory):
  """Runs all studies of the tokenizer and returns their output folder."""
  folder = tmp_path_factory.mktemp("out")
  run(study, *args, f"--out={folder}")
  return folder


def table(out, name, number=0):
  found = json.loads((out / f"{name}.json").read_text())["tables"][number]
  return found["columns"], found["rows"]


def test_quality_and_variation_match_the_decoder(models, out):
  """Compared with the API: the reconstruction from noise 0, and decodes of image 1 from noises 3, 4 and 5."""
  model = load(models["tokenizer"])
  config = model.config
  images = pipeline.eval_set(inputs.image_data(config), "synthetic", image_size=16, num_images=5)["image"]
  ids = np.asarray(model.tokenize(images))

  def decode(row, count, number):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(config.seed), number), model.latent_shape)[None]
    s = config.sampler
    found = model.detokenize(ids[row : row + 1, :count], noise=noise, num_steps=s.num_steps, guidance=s.guidance)
    return np.asarray(images_lib.round_to_8bit(found)[0]) * 255

  columns, rows = table(out, "tokens")
  assert columns == ["tokens", "psnr", "mse"] and [row[0] for row in rows] == [1, 2, 4]
  for count, (psnr, low, high), _ in rows:
    expected = [-10 * np.log10(mse(decode(i, count, i), images[i])) for i in range(5)]
    np.testing.assert_allclose(psnr, np.mean(expected), atol=0.02)
    assert min(expected) - 0.02 <= low <= psnr <= high <= max(expected) + 0.02

  columns, rows = table(out, "variation")
  assert columns == ["tokens", "psnr", "mse"] and [row[0] for row in rows] == [1, 2, 4]
  with np.load(out / study.PARTS / "variation_synthetic_2.npz", allow_pickle=False) as file:
    kept, originals = file["array_decodes"], file["array_original"]
  assert kept.shape == (2, 3, 16, 16, 3)
  np.testing.assert_array_equal(originals, images[:2])
  np.testing.assert_allclose(kept[1], [decode(1, 2, number) for number in (3, 4, 5)], atol=1)


def test_chosen_lengths_reach_their_thresholds(out):
  columns, rows = table(out, "halting")
  assert columns == ["tokens", "mean length", "within", "psnr", "mse"]
  fixed, chosen = rows[:3], rows[3:]
  assert [row[0] for row in fixed] == ["1 for all", "2 for all", "4 for all"]
  assert [row[0] for row in chosen] == sorted(row[0] for row in chosen) and "psnr >= " in chosen[0][0]
  for label, length, within, *_ in chosen:
    threshold = label.split()[-1]
    with np.load(out / study.PARTS / f"halting_synthetic_psnr_{threshold}.npz", allow_pickle=False) as file:
      lengths, reached = file["array_lengths"], file["array_within"]
    assert length[0] == lengths.mean() and 1 <= lengths.min() <= lengths.max() <= 4 and within == reached.mean()
    assert (lengths[~reached] == 4).all()
  columns, rows = table(out, "halting", 1)
  assert columns[:2] == ["objects", "scenes"] and sum(row[1] for row in rows[:-1]) == 5 == rows[-1][1]


def test_report_is_self_contained(out):
  markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
  for name in ("tokens", "variation", "halting"):
    assert f"![]({name}.png)" in markdown and f"![]({name}_grid.png)" in markdown
    assert Image.open(out / f"{name}.png").width > 300
  assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{100,}"', page)) == 6
  assert not re.search(r'src="(?!data:)|https?://', page)
  psnr = table(out, "tokens")[1][0][1][0]
  assert f"| {psnr:.4g} (" in markdown and f"<td>{psnr:.4g} (" in page
  assert not (out / study.PARTS / "tokens").exists()


def test_a_rerun_computes_nothing(args, out, monkeypatch, capsys):
  monkeypatch.setattr(batching.Batched, "__call__", lambda *_: pytest.fail("computed again"))
  before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".png"}
  run(study, *args, f"--out={out}")
  assert "tokens: computed before" in capsys.readouterr().out
  assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".png"}


def test_samples_by_sampling_and_decoder_settings(models, args, tmp_path):
  run(
    study,
    *args[:1],
    "--metrics=mae",
    f"--generator={models['class']}",
    "--study=sampling",
    f"--out={tmp_path}",
    "--classes=2,0",
    "--num_samples=2",
    "--temperatures=1,5",
    "--top_ks=1",
    "--top_ps=",
    "--guidance_scales=",
    "--decoder_step_counts=1",
  )
  own, drawn, diverse = (table(tmp_path, "sampling", i) for i in range(3))
  assert dict(own[1])["temperature"] == 1 and dict(own[1])["decoder num_steps"] == 2
  assert [row[0] for row in drawn[1]] == ["own settings", "temperature 5", "top k 1"]
  assert [row[3] for row in drawn[1]] == [4, 4, 2]  # top k 1: one distinct sample per class
  assert diverse[0] == ["choice", "own settings", "decoder steps 1"] and len(diverse[1]) == 3
  assert diverse[1][0][1] > 0
  assert Image.open(tmp_path / "sampling.png").width > 300


@pytest.mark.parametrize(
  "pattern, given",
  [
    ("--checkpoint is missing", ("--checkpoint=",)),
    (
      "unknown study 'token': one of tokens, variation, halting, steps, order, probe, sampling, or all",
      ("--study=token",),
    ),
    ("--study=sampling needs --generator", ("--study=sampling",)),
    ("--qualities is a flag of the study halting: name it in --study", ("--study=tokens", "--qualities=1")),
    ("--top_ks is a flag of the study sampling: name it in --study, and give --generator", ("--top_ks=1",)),
    ("unknown metric 'fid'", ("--metrics=fid",)),
    ("--metrics is empty: give items", ("--metrics=",)),
    ("--study is empty: give items", ("--study=",)),
    ("--decoder_scale=nan must be a finite number", ("--decoder_scale=nan",)),
    ("--temperatures takes finite numbers separated by commas, got 'nan'", ("--generator=x", "--temperatures=nan")),
    ("--top_ks: ar.top_k must be a whole number from 0 .*, got -1", ("--generator=x", "--top_ks=-1")),
    ("--decoder_step_counts: sampler.num_steps must be", ("--generator=x", "--decoder_step_counts=100000000")),
    ("--metrics=rfid compare no two images", ("--metrics=rfid",)),
    ("metric 'rfid' needs weights=DIR", ("--study=tokens", "--metrics=rfid")),
    ("--quality_metric=ssim is not among --metrics", ("--quality_metric=ssim",)),
    ("--qualities takes finite numbers separated by commas, got 'x'", ("--study=halting", "--qualities=x")),
    ("num_tokens=5 is out of range: this model takes 1 to 4", ("--num_tokens=5",)),
    ("--sources: eval.sources must be .* got .'x'", ("--sources=x", "--checkpoint=/absent")),
    ("no such generator: /absent", ("--generator=/absent",)),
  ],
)
def test_bad_flags_are_refused(args, tmp_path, pattern, given):
  """Before any study begins."""
  fails(pattern, study, *args[:2], f"--out={tmp_path}", *given)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  "pattern, name, given",
  [
    ("whole numbers separated by commas, got '1.5'", "class", ("--top_ks=1.5",)),
    ("--judges=fid is unknown: one of gfid", "class", ("--judges=fid",)),
    ("--judges=gfid needs --reference", "class", ("--judges=gfid",)),
    ("gfid.* needs weights=DIR", "class", ("--judges=gfid", "--reference=/absent", "--study=all")),
    ("--num_samples=1 leaves nothing to compare", "class", ("--num_samples=1",)),
    ("class 7 is out of range", "class", ("--classes=7",)),
    ("takes neither classes nor prompts", "none", ("--classes=1",)),
    ("--guidance_scales has no effect with a generator without", "none", ("--guidance_scales=2",)),
    ("--decoder_scales has no effect with a decoder without guidance", "none", ("--decoder_scales=2",)),
  ],
)
def test_bad_sampling_flags_are_refused(models, args, tmp_path, pattern, name, given):
  fails(pattern, study, *args[:2], f"--out={tmp_path}", "--study=sampling", f"--generator={models[name]}", *given)
  assert not any(tmp_path.iterdir())
