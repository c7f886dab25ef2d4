"""The study command on tiny random models, and what its studies are made of."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import scipy.stats

from flextok_jax import load, study
from flextok_jax.core import images as images_lib
from flextok_jax.data import pipeline
from flextok_jax.evals import batches, report
from flextok_jax.evals.metrics import measures, reference
from flextok_jax.evals.studies import halting, sampling, variation
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.stages.ar import ARStage
from flextok_jax.training import inputs
from flextok_jax.weights import fingerprints, saving
from tests.commands.test_sample import generator_config
from tests.support.commands import fails, run
from tests.support.tiny import make_params, tiny_config

RNG = np.random.default_rng(0)
MESH = sharding.make_mesh()


def pictures(*shape):
  return RNG.integers(0, 256, (*shape, 16, 16, 3)).astype(np.uint8)


def mse(a, b):
  return np.square((a.astype(float) - b) / 255).mean((-1, -2, -3))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Paths of a tokenizer of 16 px images, 4 registers and 200 codes, and of generators by class and without."""
  folder = tmp_path_factory.mktemp("models")
  config = tiny_config(eval=dict(sources=("synthetic",), num_images=5, batch_size=3, grid_images=2))
  params = make_params(make_stage(config))
  saving.save_weights(folder / "tokenizer", config, params)
  for name in ("class", "none"):
    ar = generator_config(condition=name, tokenizer=fingerprints.tokenizer(config, params))
    saving.save_weights(folder / name, ar, make_params(ARStage(ar)))
  return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def args(models):
  return (f"--checkpoint={models['tokenizer']}", "--metrics=psnr,mse", "--num_decodes=3")


@pytest.fixture(scope="module")
def out(args, tmp_path_factory):
  """What all studies of the tokenizer write."""
  folder = tmp_path_factory.mktemp("out")
  run(study, *args, f"--out={folder}")
  return folder


def table(out, name, number=0):
  found = json.loads((out / f"{name}.json").read_text())["tables"][number]
  return found["columns"], found["rows"]


# What studies are made of.


@pytest.mark.parametrize("count, batch_size", [(5, 2), (3, 64), (16, 8), (1, 1)])
def test_batches_do_not_matter(count, batch_size):
  function = lambda p, x, y: {"sum": p * x + y.sum(1), "same": y}
  x, y = np.arange(count, dtype=np.float32), np.ones((count, 2), np.float32)
  found = batches.Batched(function, np.float32(3), batch_size, MESH)(x, y)
  np.testing.assert_array_equal(found["sum"], 3 * x + 2)
  np.testing.assert_array_equal(found["same"], y)


def test_pictures_that_are_not_finite_are_refused():
  detokenize = lambda value, ids, keep_k, keys: jnp.where(keep_k == 2, value, 0.0)[:, None, None, None]
  decode = lambda value: batches.make_decode(detokenize, np.float32(value), 4, 0, 3, MESH)(
    np.zeros((4, 3), int), np.array([3, 3, 2, 1]), np.arange(4)
  )
  np.testing.assert_array_equal(decode(1.0)[:, 0, 0, 0], [128, 128, 255, 128])
  with pytest.raises(ValueError, match="not finite: these weights diverged"):
    decode(np.nan)


def test_mean_over_all_pairs():
  decoded = pictures(3, 4)
  compare = batches.make_compare(measures.make(["psnr", "mse"]), 2, MESH)
  found = variation.pairwise(compare, decoded)
  assert list(found) == ["psnr", "mse"]
  pairs = [mse(decoded[:, i], decoded[:, j]) for i, j in itertools.combinations(range(4), 2)]
  np.testing.assert_allclose(found["mse"], 4 * np.mean(pairs, 0), rtol=1e-5)  # of images in [-1, 1]
  np.testing.assert_allclose(found["psnr"], np.mean(-10 * np.log10(pairs), 0), rtol=1e-5)


def test_a_killed_study_goes_on_after_its_last_part(tmp_path, capsys):
  """And what other settings found, or a damaged file holds, is computed again."""
  computed = []

  def part(name, alive=True):
    computed.append(name)
    if not alive:
      raise KeyboardInterrupt
    return {"value": (name, 0.1)}, {"a": np.arange(3)}

  def go_on(settings, alive=True):
    computed.clear()
    parts = report.Parts(tmp_path, settings)
    return [parts(name, {"name": name}, lambda: part(name, alive or name != "b")) for name in "abc"]  # noqa: B023

  with pytest.raises(KeyboardInterrupt):
    go_on({"seed": 0}, alive=False)
  first = go_on({"seed": 0})
  assert computed == ["b", "c"] and "a: found before with these settings" in capsys.readouterr().out
  again = go_on({"seed": 0})
  assert not computed
  for (x, arrays), (y, more) in zip(first, again):
    assert x == y and x["value"][1] == 0.1
    np.testing.assert_array_equal(arrays["a"], more["a"])
  (tmp_path / report.PARTS / "b.npz").write_bytes(b"PK")
  go_on({"seed": 0})
  assert computed == ["b"]
  go_on({"seed": 1})
  assert computed == ["a", "b", "c"]


def test_lengths_by_number_of_objects():
  objects, lengths = np.array([-1, 2, 1, 2, 3, -1]), np.array([9, 4, 1, 6, 7, 9])
  rows = halting.by_objects(objects, lengths)
  assert {k: (n, mean[0]) for k, (n, mean) in rows.items()} == {1: (1, 1.0), 2: (2, 5.0), 3: (1, 7.0)}
  rho, p = halting.rank_correlation(objects, lengths)
  assert (rho, p) == tuple(scipy.stats.spearmanr(objects[1:5], lengths[1:5]))
  assert halting.rank_correlation(objects, np.full(6, 4)) == (None, None)
  assert halting.rank_correlation(np.full(6, -1), lengths) == (None, None)


def test_judges():
  images, conditions = pictures(5), [3, 3, "a star", "a star", "a star"]
  judge = sampling.diversity(batches.make_compare(measures.make(["mae"]), 4, MESH))
  gaps = [np.abs(images[i] / 255 - images[i + 1] / 255).mean() for i in (0, 2)]  # as many of each condition
  np.testing.assert_allclose(judge(images, conditions)["MAE between samples"], np.mean(gaps), rtol=1e-5)
  with pytest.raises(ValueError, match="two samples of a condition at least: raise --num_samples"):
    judge(images, [3, 3, 1, 1, 2])

  look = lambda x: {layer: x.reshape(len(x), -1)[:, :2].astype(np.float64) for layer in ("pool", "spatial")}
  judge = sampling.against(reference.look_at([images], look), look, ("gfid", "recall"), 2)
  same, other = judge(images, conditions), judge(pictures(5), conditions)
  assert list(same) == ["gfid", "recall"] and same["gfid"] < 1e-6 < other["gfid"] and same["recall"] == 1


def test_one_change_at_a_time():
  rows = sampling.one_at_a_time({"top_k": 0, "num_steps": 4}, {"top_k": [0, 5], "num_steps": [1]}, "decoder ")
  assert rows == {
    "own settings": {"top_k": 0, "num_steps": 4},
    "decoder top k 5": {"top_k": 5, "num_steps": 4},
    "decoder steps 1": {"top_k": 0, "num_steps": 1},
  }


# The command.


def test_quality_and_variation_are_those_of_the_decoder(models, out):
  """By the API: the reconstruction from noise 0, and three decodes of image 1 from noises 3, 4, 5."""
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
  with np.load(out / report.PARTS / "variation_synthetic_2.npz", allow_pickle=False) as file:
    kept, originals = file["array_decodes"], file["array_original"]
  assert kept.shape == (2, 3, 16, 16, 3)
  np.testing.assert_array_equal(originals, images[:2])
  np.testing.assert_allclose(kept[1], [decode(1, 2, number) for number in (3, 4, 5)], atol=1)


def test_lengths_reach_their_thresholds(out):
  columns, rows = table(out, "halting")
  assert columns == ["tokens", "mean length", "within", "psnr", "mse"]
  fixed, chosen = rows[:3], rows[3:]
  assert [row[0] for row in fixed] == ["1 for all", "2 for all", "4 for all"]
  assert [row[0] for row in chosen] == sorted(row[0] for row in chosen) and "psnr >= " in chosen[0][0]
  for label, length, within, *_ in chosen:
    threshold = label.split()[-1]
    with np.load(out / report.PARTS / f"halting_synthetic_psnr_{threshold}.npz", allow_pickle=False) as file:
      lengths, reached = file["array_lengths"], file["array_within"]
    assert length[0] == lengths.mean() and 1 <= lengths.min() <= lengths.max() <= 4 and within == reached.mean()
    assert (lengths[~reached] == 4).all()
  columns, rows = table(out, "halting", 1)
  assert columns[:2] == ["objects", "scenes"] and sum(row[1] for row in rows[:-1]) == 5 == rows[-1][1]


def test_report_needs_no_other_file(out):
  markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
  for name in ("tokens", "variation", "halting"):
    assert f"![]({name}.png)" in markdown and f"![]({name}_grid.png)" in markdown
    assert Image.open(out / f"{name}.png").width > 300
  assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{100,}"', page)) == 6
  assert not re.search(r'src="(?!data:)|https?://', page)
  psnr = table(out, "tokens")[1][0][1][0]
  assert f"| {psnr:.4g} (" in markdown and f"<td>{psnr:.4g} (" in page
  assert not (out / report.PARTS / "tokens").exists()


def test_nothing_is_computed_twice(args, out, monkeypatch, capsys):
  for name in ("make_decode", "Batched"):
    monkeypatch.setattr(batches, name, lambda *_: lambda *_: pytest.fail("computed again"))
  before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".png"}
  run(study, *args, f"--out={out}")
  assert "tokens: found before" in capsys.readouterr().out
  assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".png"}


def test_samples_by_choice_and_decoder(models, args, tmp_path):
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
  assert [row[3] for row in drawn[1]] == [4, 4, 2]  # the likeliest alone: the same for a class
  assert diverse[0] == ["choice", "own settings", "decoder steps 1"] and len(diverse[1]) == 3
  assert diverse[1][0][1] > 0
  assert Image.open(tmp_path / "sampling.png").width > 300


@pytest.mark.parametrize(
  "pattern, given",
  [
    ("--checkpoint is missing", ("--checkpoint=",)),
    ("unknown study 'token': of tokens, variation, halting, sampling, or all", ("--study=token",)),
    ("--study=sampling needs --generator", ("--study=sampling",)),
    ("--qualities is of the study of halting: name it in --study", ("--study=tokens", "--qualities=1")),
    ("--top_ks is of the study of sampling: name it in --study, and give --generator", ("--top_ks=1",)),
    ("unknown metric 'fid'", ("--metrics=fid",)),
    ("--metrics= compare no two images: name one of psnr", ("--metrics=",)),
    ("--metrics=rfid compare no two images", ("--metrics=rfid",)),
    ("metric rfid needs weights", ("--study=tokens", "--metrics=rfid")),
    ("--quality_metric=ssim is not among --metrics", ("--quality_metric=ssim",)),
    ("--qualities takes numbers separated by commas, got 'x'", ("--study=halting", "--qualities=x")),
    ("num_tokens=5 is out of range: this model takes 1 to 4", ("--num_tokens=5",)),
  ],
)
def test_bad_flags(args, tmp_path, pattern, given):
  fails(pattern, study, *args[:2], f"--out={tmp_path}", *given)


@pytest.mark.parametrize(
  "pattern, name, given",
  [
    ("whole numbers separated by commas, got '1.5'", "class", ("--top_ks=1.5",)),
    ("--judges=fid is unknown: of gfid", "class", ("--judges=fid",)),
    ("--judges=gfid needs --reference", "class", ("--judges=gfid",)),
    ("--num_samples=1 leaves nothing to compare", "class", ("--num_samples=1",)),
    ("class 7 is out of range", "class", ("--classes=7",)),
    ("takes neither classes nor prompts", "none", ("--classes=1",)),
    ("--guidance_scales has no effect with a generator without", "none", ("--guidance_scales=2",)),
    ("--decoder_scales has no effect with a decoder without guidance", "none", ("--decoder_scales=2",)),
  ],
)
def test_bad_flags_of_sampling(models, args, tmp_path, pattern, name, given):
  fails(pattern, study, *args[:2], f"--out={tmp_path}", "--study=sampling", f"--generator={models[name]}", *given)
