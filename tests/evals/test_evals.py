"""Metrics against scikit-image, and reconstruction reports of tiny models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import skimage.data
import skimage.metrics

from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.evals import plots, reconstruction
from flextok_jax.evals.metrics import image as metrics
from flextok_jax.stages import make_stage
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
  return reconstruction.Reconstruction(stage.predict_fns, sets, (1, 2, 4), batch_size, seed=3, **kwargs)


@pytest.fixture(scope="module")
def in_parts(stage, images):
  """Batches of 3 + 2 and a padded row, and of 1 and two padded rows."""
  return evaluator(stage, {"left": images, "right": images[:1]}, 3)


@pytest.fixture(scope="module")
def report(in_parts, params):
  return in_parts.run(params)


def pairs():
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (33, 47, 3))
  photo = skimage.data.astronaut()[:64, 60:124].astype(int)
  near = np.clip(photo + rng.integers(-9, 10, photo.shape), 0, 255)
  flat, dent = np.full((16, 16, 3), 255), np.full((16, 16, 3), 255)
  dent[:4, :4] = 254
  return {
    "noise": (noise, noise[::-1]),
    "near": (photo, near),
    "unlike": (photo, skimage.data.coffee()[:64, :64]),
    "flat": (flat, dent),
    "smallest": (noise[:11, :11], noise[:11, 20:31]),
  }


@pytest.mark.parametrize("name", pairs())
def test_metrics_equal_scikit_image(name):
  a, b = (x / 255 for x in pairs()[name])
  measure = jax.jit(lambda a, b: {k: f(a[None], b[None])[0] for k, f in metrics.METRICS.items()})
  ours = measure(np.float32(a), np.float32(b))
  ssim = skimage.metrics.structural_similarity(
    a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
  )
  np.testing.assert_allclose(ours["ssim"], ssim, atol=1e-6)
  np.testing.assert_allclose(ours["psnr"], skimage.metrics.peak_signal_noise_ratio(a, b, data_range=1), atol=2e-5)
  np.testing.assert_allclose(ours["mae"], np.abs(a - b).mean(), rtol=1e-5)


def test_metrics_of_equal_images_are_finite_and_per_image():
  a = jnp.zeros((2, 16, 16, 3))
  b = a.at[1].set(0.1)
  np.testing.assert_allclose(metrics.psnr(a, b), [100, 20], atol=1e-4)
  np.testing.assert_allclose(metrics.mae(a, b), [0, 0.1], atol=1e-6)
  assert metrics.ssim(a, b)[0] == 1 and metrics.ssim(a, b)[1] < 1


def test_ssim_refuses_images_below_its_window():
  with pytest.raises(ValueError, match="11x11"):
    metrics.ssim(jnp.zeros((1, 10, 16, 3)), jnp.zeros((1, 10, 16, 3)))


def test_rounding_is_that_of_a_png():
  levels = np.arange(256, dtype=np.float32)
  np.testing.assert_array_equal(np.round(images_lib.round_to_8bit(jnp.asarray(levels / 127.5 - 1)) * 255), levels)
  np.testing.assert_array_equal(images_lib.round_to_8bit(jnp.asarray([-3.0, 3.0])), [0, 1])
  assert np.isnan(images_lib.round_to_8bit(jnp.asarray([np.nan])))


def test_token_counts():
  assert reconstruction.token_counts((), 16) == (1, 2, 4, 8, 16)
  assert reconstruction.token_counts((), 12) == (1, 2, 4, 8, 12)
  assert reconstruction.token_counts((), 1) == (1,)
  assert reconstruction.token_counts((5, 1, 5), 16) == (1, 5)
  for bad in (0, 17, -1):
    with pytest.raises(ValueError, match=f"num_tokens {bad} .* 1 to 16"):
      reconstruction.token_counts((1, bad), 16)


def test_same_noise_at_every_token_count_and_another_for_every_image(in_parts, params):
  zero_head = jax.tree.map(lambda x: x, params)
  zero_head["decoder"] = jax.tree.map(jnp.zeros_like, params["decoder"])
  shown = in_parts.run(zero_head).examples["left"]  # the velocity is zero: a decoded image is its starting noise
  np.testing.assert_array_equal(shown["1"], shown["2"])
  np.testing.assert_array_equal(shown["1"], shown["4"])
  assert len({image.tobytes() for image in shown["1"]}) == len(shown["1"]) == 4


def test_padding_is_counted_once_and_batches_do_not_matter(stage, images, params, report):
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


def test_token_counts_matter_to_the_decoder(report):
  assert (report.examples["left"]["1"] != report.examples["left"]["4"]).any()


def test_batches_over_devices_give_the_same_report(stage, images, params, report):
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  many = evaluator(stage, {"left": images}, 3, sharding=sharding)  # rounded up to 4
  scores = many.run(jax.device_put(params, jax.NamedSharding(mesh, jax.P()))).scores["sets"]["left"]
  assert scores["num_images"] == 5
  for column, values in report.scores["sets"]["left"]["by_tokens"].items():
    np.testing.assert_allclose(list(scores["by_tokens"][column].values()), list(values.values()), rtol=1e-3)


def test_bad_sets_and_diverged_weights_are_refused(stage, images, in_parts, params):
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
  assert report.scalars()["eval/left/psnr_2"] == report.scores["sets"]["left"]["by_tokens"]["2"]["psnr"]
  assert len(report.table().splitlines()) == 2 * (2 + 3) + 1

  grid = np.asarray(Image.open(tmp_path / "new" / "grid_left.png"))
  left, top, right, bottom = plots.cell_box(3, 3, 16, 16)  # rows: 4 images; columns: original, 1, 2, 4
  assert 0 < grid.shape[0] - bottom < 20 and 0 < grid.shape[1] - right < 20
  for row in range(4):
    for column, name in enumerate(report.examples["left"]):
      left, top, right, bottom = plots.cell_box(row, column, 16, 16)
      assert right - left == bottom - top == plots.MIN_CELL
      expected = report.examples["left"][name][row].repeat(6, axis=0).repeat(6, axis=1)
      np.testing.assert_array_equal(grid[top:bottom, left:right], expected)
  np.testing.assert_array_equal(report.examples["left"]["original"], images[:4])
  assert (grid[:, -1] == 255).all() and (grid[0] == 255).all()


def test_grid_keeps_large_images_at_their_size():
  left, top, right, bottom = plots.cell_box(0, 0, 100, 128)
  assert (right - left, bottom - top) == (128, 100)


def test_vae_report_has_one_column_and_no_curve(images, tmp_path):
  stage = make_stage(
    tiny_config(stage="vae", vae=dict(latent_channels=4, block_out_channels=(32,), layers_per_block=1))
  )
  report = evaluator(stage, {"a": images}, 5).run(make_params(stage))
  assert list(report.scores["sets"]["a"]["by_tokens"]) == ["vae"]
  paths = report.write(tmp_path)
  assert sorted(path.name for path in paths) == ["grid_a.png", "report.json"]


def test_files_are_whole_or_absent(tmp_path):
  (tmp_path / "taken").mkdir()
  with pytest.raises(ValueError, match="cannot write"):
    files.write_file(tmp_path / "taken", b"x")
  with pytest.raises(ValueError, match="cannot write"):
    (tmp_path / "file").write_text("old")
    files.write_file(tmp_path / "file" / "below", b"x")
  files.write_file(tmp_path / "file", b"new")
  assert (tmp_path / "file").read_bytes() == b"new"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
