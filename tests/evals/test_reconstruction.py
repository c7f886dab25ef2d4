"""Reconstruction reports of tiny models: batches, devices, resuming, files."""

import json

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
import numpy as np
from PIL import Image
import pytest
import skimage.data

from flextok_jax.core import images as images_lib
from flextok_jax.evals import from_config, grids, published, reconstruction
from flextok_jax.evals.metrics import frechet
from flextok_jax.evals.metrics import image as metrics
from flextok_jax.evals.metrics import samples as sample_metrics
from flextok_jax.evals.progress import Progress
from flextok_jax.evals.report import Report
from flextok_jax.stages import make_stage
from tests.support.scores import assert_same_scores
from tests.support.tiny import make_params, tiny_config


@pytest.fixture(scope="module")
def images():
  picture = skimage.data.astronaut()
  return np.stack([picture[y : y + 16, y : y + 16] for y in range(60, 260, 40)])


@pytest.fixture(scope="module")
def stage():
  return make_stage(tiny_config())


@pytest.fixture(scope="module")
def params(stage):
  return make_params(stage)


def evaluator(stage, sets, batch_size, **kwargs):
  settings = reconstruction.Settings((1, 2, 4), batch_size, seed=3)
  return reconstruction.Reconstruction(stage.predict_fns, sets, settings, **kwargs)


@pytest.fixture(scope="module")
def in_parts(stage, images):
  """Uses batches of 3 and of 2 + 1 padding row, then of 1 + 2 padding rows."""
  return evaluator(stage, {"left": images, "right": images[:1]}, 3)


@pytest.fixture(scope="module")
def report(in_parts, params):
  return in_parts.run(params)


def test_noise_is_shared_by_token_counts_and_differs_between_images(in_parts, params):
  zero_head = jax.tree.map(lambda x: x, params)
  zero_head["decoder"] = jax.tree.map(jnp.zeros_like, params["decoder"])
  shown = in_parts.run(zero_head).examples["left"]  # zero velocity: the decoded image is its initial noise
  np.testing.assert_array_equal(shown["1"], shown["2"])
  np.testing.assert_array_equal(shown["1"], shown["4"])
  assert len({image.tobytes() for image in shown["1"]}) == len(shown["1"]) == 4


def test_images_of_several_sizes(images, tmp_path):
  """Each has the metrics and the noise that it has alone; pictures are padded to one size; partial results go on."""
  part = tiny_config().encoder.to_dict() | dict(posemb_scaling="scaled")
  stage = make_stage(tiny_config(encoder=part, decoder=part))
  params = make_params(stage)
  wide = np.concatenate([images[:2], images[2:4]], 2)  # 16 x 32
  sets = {"set": [(np.array([0, 2, 4], np.int32), images[:3]), (np.array([1, 3], np.int32), wide)]}
  scaled = evaluator(stage, sets, 2)
  report = scaled.run(params)
  found = report.scores["sets"]["set"]
  assert found["num_images"] == 5 and found["sizes"] == {"16x16": 3, "16x32": 2}
  assert {column: shown.shape for column, shown in report.examples["set"].items()} == dict.fromkeys(
    ("original", "1", "2", "4"), (4, 16, 32, 3)
  )
  np.testing.assert_array_equal(report.examples["set"]["original"][:3, :, 8:24], images[:3])
  assert (report.examples["set"]["2"][:3, :, :8] == 255).all()
  values = []
  for numbers, given in sets["set"]:
    for i, image in zip(numbers, given):
      key = jax.random.fold_in(jax.random.key(3), i)[None]
      ids = stage.predict_fns["tokenize"](params, image[None])
      restored = stage.predict_fns["detokenize"](params, ids, np.array([2]), key, image.shape[:2])
      values.append(metrics.psnr(jnp.float32(image[None]) / 255, images_lib.round_to_8bit(restored))[0])
  np.testing.assert_allclose(found["by_tokens"]["2"]["psnr"], np.mean(values), rtol=1e-3)

  class Stopped(Progress):
    def after_batch(self, part, done, *args):
      super().after_batch(part, done, *args)
      if done == 3:
        raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    evaluator(stage, sets, 2, progress=Stopped(tmp_path, every=1)).run(params)
  again = evaluator(stage, sets, 2, progress=Progress(tmp_path, every=1)).run(params)
  assert again.scores == report.scores


def test_padding_is_ignored_and_batches_do_not_matter(stage, images, params, report):
  tokenize, detokenize = (jax.jit(stage.predict_fns[k]) for k in ("tokenize", "detokenize"))
  scores = []
  for i, image in enumerate(images):  # one by one
    key = jax.random.fold_in(jax.random.key(3), i)
    restored = images_lib.round_to_8bit(detokenize(params, tokenize(params, image[None]), np.array([2]), key[None]))
    scores.append({k: f(jnp.float32(image[None]) / 255, restored)[0] for k, f in metrics.METRICS.items()})
    if i < 4:
      np.testing.assert_allclose(report.examples["left"]["2"][i], np.asarray(restored[0]) * 255, atol=1.01)
  for name, count in (("left", 5), ("right", 1)):
    assert report.scores["sets"][name]["num_images"] == count
    for metric, value in report.scores["sets"][name]["by_tokens"]["2"].items():
      np.testing.assert_allclose(value, np.mean([score[metric] for score in scores[:count]]), rtol=1e-3)


def test_metrics_keep_their_order(report):
  assert list(report.scores["sets"]["left"]["by_tokens"]["2"]) == list(metrics.METRICS)
  assert report.table().splitlines()[1].split() == ["tokens", "PSNR", "dB", "SSIM", "MAE"]


def test_token_count_affects_the_decoder(report):
  assert (report.examples["left"]["1"] != report.examples["left"]["4"]).any()


def test_batches_on_several_devices_give_the_same_report(stage, images, params, report):
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  many = evaluator(stage, {"left": images}, 3, mesh=mesh)  # rounded up to 4
  scores = many.run(jax.device_put(params, jax.NamedSharding(mesh, jax.P()))).scores["sets"]["left"]
  assert scores["num_images"] == 5
  for column, values in report.scores["sets"]["left"]["by_tokens"].items():
    np.testing.assert_allclose(list(scores["by_tokens"][column].values()), list(values.values()), rtol=1e-3)


def test_bad_sets_and_non_finite_weights_are_refused(stage, images, in_parts, params):
  with pytest.raises(ValueError, match="eval.sources"):
    evaluator(stage, {}, 4)
  with pytest.raises(ValueError, match="'a' has no images"):
    evaluator(stage, {"a": images[:0]}, 4)
  with pytest.raises(ValueError, match="8x16 px"):
    evaluator(stage, {"a": images[:, :8]}, 4)
  with pytest.raises(ValueError, match="not finite"):
    in_parts.run(jax.tree.map(lambda x: x * np.nan, params))


def test_written_report(report, images, tmp_path):
  paths = report.write(tmp_path / "new", {"checkpoint": "x"})
  assert sorted(path.name for path in paths) == ["curve.png", "grid_left.png", "grid_right.png", "report.json"]
  assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
  assert json.loads(paths[0].read_text()) == {"checkpoint": "x", **report.scores}
  assert report.scalars["eval/left/psnr_2"] == report.scores["sets"]["left"]["by_tokens"]["2"]["psnr"]
  assert len(report.table().splitlines()) == 2 * (2 + 3) + 1

  grid = np.asarray(Image.open(tmp_path / "new" / "grid_left.png"))
  left, top, right, bottom = grids.cell_box(3, 3, 16, 16)  # rows: 4 images; columns: original, 1, 2, 4
  assert 0 < grid.shape[0] - bottom < 20 and 0 < grid.shape[1] - right < 20
  for row in range(4):
    for column, name in enumerate(report.examples["left"]):
      left, top, right, bottom = grids.cell_box(row, column, 16, 16)
      assert right - left == bottom - top == grids.MIN_CELL
      expected = report.examples["left"][name][row].repeat(6, axis=0).repeat(6, axis=1)
      np.testing.assert_array_equal(grid[top:bottom, left:right], expected)
  np.testing.assert_array_equal(report.examples["left"]["original"], images[:4])
  assert (grid[:, -1] == 255).all() and (grid[0] == 255).all()


def test_vae_report_has_one_column_and_no_curve(images, tmp_path):
  stage = make_stage(
    tiny_config(stage="vae", vae=dict(latent_channels=4, block_out_channels=(32,), layers_per_block=1))
  )
  report = evaluator(stage, {"a": images}, 5).run(make_params(stage))
  assert list(report.scores["sets"]["a"]["by_tokens"]) == ["vae"]
  paths = report.write(tmp_path)
  assert sorted(path.name for path in paths) == ["grid_a.png", "report.json"]


# Network metrics and interrupted evaluations.

FEATURES = np.random.default_rng(5).normal(size=(16 * 16 * 3, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def noise_images():
  return np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3)).astype(np.uint8)


class Killed(Exception):
  pass


class Reader:
  """Images that can be read a limited number of times."""

  def __init__(self, images, reads):
    self._images, self._reads, self.shape = images, reads, images.shape

  def __getitem__(self, rows):
    self._reads -= 1
    if self._reads < 0:
      raise Killed
    return self._images[rows]


def features(images):
  return {"pool": images.reshape(len(images), -1) @ FEATURES}


def make(stage, images, batch_size=4, **options):
  return reconstruction.Reconstruction(
    stage.predict_fns,
    {"set": images},
    reconstruction.Settings((1, 4), batch_size, seed=3, grid_images=2),
    metrics=metrics.make_metrics(("psnr", "perceptual")),
    features=Partial(features),
    **options,
  )


@pytest.fixture(scope="module")
def scores(stage, params, noise_images):
  return make(stage, noise_images).run(params).scores["sets"]["set"]


def test_rfid_and_means_equal_those_of_all_images(stage, params, noise_images, scores):
  """Compared with plain formulas on all images at once."""
  settings = reconstruction.Settings((1, 4), 11, seed=3, grid_images=11)
  evaluator = reconstruction.Reconstruction(
    stage.predict_fns, {"set": noise_images}, settings, metrics=metrics.make_metrics(("psnr",))
  )
  pictures = evaluator.run(params).examples["set"]
  for column in ("1", "4"):
    a, b = (features(pictures[name].astype(np.float64) / 255)["pool"] for name in ("original", column))
    rfid = frechet.frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    np.testing.assert_allclose(scores["by_tokens"][column]["rfid"], rfid, rtol=1e-4)
    mse = np.square((pictures["original"].astype(float) - pictures[column]) / 255).mean((1, 2, 3))
    np.testing.assert_allclose(scores["by_tokens"][column]["psnr"], (-10 * np.log10(mse)).mean(), rtol=1e-5)
    low, high = sample_metrics.bootstrap_interval(-10 * np.log10(mse))
    np.testing.assert_allclose(scores["intervals"][column]["psnr"], [low, high], rtol=1e-5)
    assert low < scores["by_tokens"][column]["psnr"] < high


def test_scores_are_independent_of_devices_and_batches(stage, params, noise_images, scores):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
  many = make(stage, noise_images, mesh=mesh).run(placed)
  assert_same_scores(many.scores["sets"]["set"], scores)
  assert_same_scores(make(stage, noise_images, 11).run(params).scores["sets"]["set"], scores)


def test_interrupted_evaluation_resumes(stage, params, noise_images, scores, tmp_path, capsys):
  keep = lambda settings: Progress(tmp_path / "kept", settings, every=1)
  with pytest.raises(Killed):
    make(stage, Reader(noise_images, 2), progress=keep({"a": 1})).run(params)
  (kept,) = (tmp_path / "kept").iterdir()
  before = kept.read_bytes()
  report = make(stage, Reader(noise_images, 3), progress=keep({"a": 1})).run(params)  # two batches and the grid
  assert "set: resuming after 4 images" in capsys.readouterr().out
  assert_same_scores(report.scores["sets"]["set"], scores)
  assert len(report.examples["set"]["4"]) == 2

  kept.write_bytes(before)
  with pytest.raises(Killed):  # other settings: everything is read again
    make(stage, Reader(noise_images, 2), progress=keep({"a": 2})).run(params)
  assert "with other settings or weights: set starts over" in capsys.readouterr().out
  kept.write_bytes(before[:-30])
  assert_same_scores(make(stage, noise_images, progress=keep({"a": 1})).run(params).scores["sets"]["set"], scores)
  assert "is damaged: set starts over" in capsys.readouterr().out
  keep({"a": 1}).clear()
  assert not (tmp_path / "kept").exists()


def test_published_rows_beside_ours():
  config = tiny_config()
  scores = {"sets": {name: {"by_tokens": {"1": {"psnr": 9.5, "ssim": 0.2}}} for name in ("folder", "photos")}}
  report = Report(scores, ["a table"], {})
  with config.unlocked():
    config.eval.sources = ("folder", "photos")
    config.data.sources.folder.path, config.image_size = "/data/ImageNet/train", published.IMAGE_SIZE
  found = from_config.with_published(report, config).tables
  assert len(found) == 2 and found[1].title.startswith("folder: published reconstructions of ImageNet validation")
  assert found[1].rows[0] == ["ours", 1, "9.50", "0.200", "this evaluation"]
  assert found[1].rows[1][:4] == ["FlexTok d18-d28", 1, "9.35", "0.187"]
  assert ["Open-MAGVIT2 16x16", 256, "17.00", "0.398", "the Cosmos paper, as cited there"] in found[1].rows
  with config.unlocked():
    config.image_size = 128
  assert from_config.with_published(report, config) is report


def test_distances_of_few_images_have_a_caution():
  few = frechet.caution("gfid", {"samples": 50, "reference images": 50_000}, 2048)
  assert few.startswith("Caution: gfid of 50 samples with 2048 features: their covariance is singular")
  assert frechet.caution("gfid", {"samples": 50_000, "reference images": None}, 2048) == ""


def test_log_linear_fit():
  """A line over log2 of the count is found again, with other values the normal equations hold."""
  counts = [1, 2, 4, 8, 32]
  slope, intercept, share = reconstruction.fit_log_linear(counts, [3.0 - 0.5 * np.log2(count) for count in counts])
  np.testing.assert_allclose([slope, intercept, share], [-0.5, 3.0, 1.0], rtol=1e-12)
  values = np.array([13.0, 13.7, 15.0, 16.5, 18.8])
  slope, intercept, share = reconstruction.fit_log_linear(counts, values)
  residual = values - intercept - slope * np.log2(counts)
  np.testing.assert_allclose([residual.sum(), residual @ np.log2(counts)], 0, atol=1e-9)
  assert share == pytest.approx(1 - residual.var() / values.var())
  with pytest.raises(ValueError, match=r"two different token counts, got \[4, 4\]"):
    reconstruction.fit_log_linear([4, 4], [1.0, 2.0])
