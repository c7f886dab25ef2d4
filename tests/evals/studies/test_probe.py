"""Linear probes: ridge regression against numpy, the study against the API, sources with and without classes."""

import json

import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from flextok_jax import load, study
from flextok_jax.core.hashing import hash_tree
from flextok_jax.data import pipeline
from flextok_jax.evals.studies import probe
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs
from flextok_jax.weights import saving
from flextok_jax.weights.perception import networks
from tests.support import clip_reference, vit_reference
from tests.support.commands import fails, run
from tests.support.tiny import make_params, tiny_config

TRAIN, VALIDATION = 40, 24


@pytest.mark.parametrize("samples, features", [(200, 7), (30, 7), (9, 25), (100, 300)])
def test_ridge_is_the_closed_form(samples, features):
  """In the primal form; the intercept is not penalised."""
  rng = np.random.default_rng(0)
  common = 1e3 * rng.normal(size=(samples + 5, 1))  # so that features are correlated
  x, new = np.split((common + rng.normal(2, 3, (samples + 5, features))).astype(np.float32), [samples])
  x[:, 3] = new[:, 3] = 0.7  # a feature that does not vary
  y = rng.normal(size=(samples, 2))
  varying = np.arange(features) != 3
  wide = x.astype(np.float64)
  a, b = ((part - wide.mean(0))[:, varying] / wide.std(0)[varying] for part in (wide, new))
  penalties = probe.PENALTIES[0], 0.5
  for penalty, found in zip(penalties, probe.ridge(x, y, new, penalties), strict=True):
    gram = a.T @ a + penalty * max(samples, features) * np.eye(features - 1)
    np.testing.assert_allclose(found, b @ np.linalg.solve(gram, a.T @ (y - y.mean(0))) + y.mean(0), atol=1e-6)


def test_probe_chooses_a_penalty_that_finds_few_features_among_many():
  rng = np.random.default_rng(1)
  labels, expected = rng.integers(0, 3, 120), rng.integers(0, 3, 200)
  features = lambda labels: np.concatenate([4 * np.eye(3)[labels], np.zeros((len(labels), 150))], 1)
  x, new = (part + rng.normal(size=part.shape) for part in map(features, (labels, expected)))
  right = (probe.probe(x, labels, new) == expected).mean()
  each = [(score.argmax(1) == expected).mean() for score in probe.ridge(x, np.eye(3)[labels], new, probe.PENALTIES)]
  assert right > 0.75 and right > max(each) - 0.03 and right > each[0] + 0.1 and right > each[-1] + 0.2
  assert abs((probe.probe(x, rng.permutation(labels), new) == expected).mean() - 1 / 3) < 0.15


def folder_of_classes(root, count):
  """Writes 16 px pictures of noise around a colour for each of two classes."""
  rng = np.random.default_rng(count)
  for name, color in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
    (root / name).mkdir(parents=True)
    for i in range(count):
      pixels = np.clip(rng.normal(color, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(root / name / f"{i}.png")
  return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns paths of tokenizers with ordered tokens and a grid; their sets: scenes, two classes of colour, photos."""
  folder = tmp_path_factory.mktemp("models")
  paths = {name: str(folder_of_classes(folder / name, count)) for name, count in (("path", 12), ("val_path", 6))}
  part = dict(width=32, depth=2, head_dim=16, patch_size=4)
  settings = dict(
    encoder=part,
    eval=dict(sources=("synthetic", "folder", "photos"), num_images=VALIDATION, batch_size=16, grid_images=2),
    data=dict(sources=dict(folder=paths)),
  )
  grid = dict(
    tokens=dict(layout="grid", num_registers=16, levels=(8, 5, 5), nested_dropout="none"),
    decoder=part | dict(modulation="shared"),
  )
  for name, more in (("ordered", {}), ("grid", grid)):
    config = tiny_config(**settings, **more)
    saving.save_weights(folder / name, config, make_params(make_stage(config)))
  return {name: f"--checkpoint={folder / name}" for name in ("ordered", "grid")}


def tables(out):
  """Returns {set: ({features: {tokens: accuracy}}, {other features: accuracy})}."""
  found = {}
  for table in json.loads((out / "probe.json").read_text())["tables"]:
    by_tokens, others = found.setdefault(table["title"].split(":")[0], ({}, {}))
    if table["columns"][0] == "tokens":
      for name, *cells in zip(table["columns"][1:], *(row[1:] for row in table["rows"])):
        by_tokens[name] = {row[0]: cell for row, cell in zip(table["rows"], cells)}
    else:
      others.update(table["rows"])
  return found


ARGS = ("--study=probe", "--metrics=mse", f"--train_images={TRAIN}")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  folder = tmp_path_factory.mktemp("networks")
  for name, reference, case in (("dinov2", vit_reference, "registers"), ("clip", clip_reference, "laion")):
    (folder / name).mkdir()
    reference.write(case, folder / name)
  clip_reference.write_tokenizer(folder / "clip")
  return str(folder)


@pytest.fixture(scope="module")
def out(models, weights, tmp_path_factory):
  folder = tmp_path_factory.mktemp("out")
  run(study, models["ordered"], *ARGS, f"--weights={weights}", f"--out={folder}")
  return folder


def images_of(config, name, split, count):
  records = pipeline.EvalImages(
    inputs.image_data(ConfigDict(config)), name, image_size=16, num_images=count, split=split
  ).records(slice(None))
  return np.stack([record["image"] for record in records]), np.array([record["label"] for record in records])


@pytest.mark.parametrize("name, classes", [("synthetic", 16), ("folder", 2)])
def test_accuracies_are_those_of_probes_of_features_of_the_api(models, weights, out, name, classes):
  model = load(models["ordered"].removeprefix("--checkpoint="))
  train, labels = images_of(model.config, name, "train", TRAIN)
  validation, expected = images_of(model.config, name, "validation", VALIDATION)
  known, y = np.unique(labels, return_inverse=True)
  assert len(known) <= classes and (len(known) == classes or name == "synthetic")

  def accuracy(features):
    predicted = probe.probe(*(part.reshape(len(part), -1) for part in (features(train),)), y, features(validation))
    return (known[predicted] == expected).mean()

  def flat(*args, **kwargs):
    return lambda images: np.asarray(model.features(images, *args, **kwargs)).reshape(len(images), -1)

  by_tokens, others = tables(out)[name]
  assert list(by_tokens) == ["registers", "codes", "registers, random encoder", "codes, random encoder"]
  slack = 1.01 / VALIDATION  # an image at the border of two classes
  for count in (1, 2, 4):
    assert by_tokens["registers"][count][0] == pytest.approx(accuracy(flat(num_tokens=count)), abs=slack)
    assert by_tokens["codes"][count][0] == pytest.approx(accuracy(flat("codes", num_tokens=count)), abs=slack)
  assert list(others) == [*("latents", "patches", "patches, random encoder", "dinov2", "clip", "most frequent class")]
  patches = lambda images: np.asarray(model.features(images, "patches", layer=1)).mean(1)
  assert others["patches"][0] == pytest.approx(accuracy(patches), abs=slack)
  pixels = lambda images: images.reshape(len(images), -1).astype(np.float32)
  assert others["latents"][0] == pytest.approx(accuracy(pixels), abs=slack)
  for network, function in networks.features(weights).items():
    unit = lambda images, function=function: np.asarray(function(images / np.float32(255)))
    assert others[network][0] == pytest.approx(accuracy(unit), abs=slack)
  assert others["most frequent class"] == (expected == known[np.bincount(y).argmax()]).mean()
  if name == "folder":
    assert others["latents"][0] == others["patches"][0] == 1  # colours are linear in pixels


def test_the_control_has_other_weights_and_tokens_that_differ(models):
  subject = study._load_subject(flags_of(models["ordered"]))
  drawn = probe._random_encoder(subject)
  shapes = lambda tree: jax.tree.map(np.shape, tree)
  assert shapes(drawn) == shapes(subject.params["encoder"])
  assert hash_tree({}, drawn) != hash_tree({}, subject.params["encoder"])
  encode, model = probe._encoder(subject, 10, random=True)
  images, _ = images_of(subject.config, "synthetic", "validation", 8)
  codes = np.asarray(encode(model, images)["codes"])
  assert (codes.std(0) > 0).mean() > 0.5  # a head of zeros would give one code to all


def flags_of(*args):
  from absl import flags

  values = flags.FlagValues()
  study.define_flags(values)
  values(["study", *args])
  return values


def test_report(models, weights, out, monkeypatch, capsys):
  assert Image.open(out / "probe.png").width > 300
  assert not (out / "probe_grid.png").exists()
  markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
  assert "![](probe.png)" in markdown and "_grid.png" not in markdown and "| most frequent class |" in markdown
  assert page.count("data:image/png") == 1
  monkeypatch.setattr(probe, "_read", lambda *_: pytest.fail("computed again"))
  run(study, models["ordered"], *ARGS, f"--weights={weights}", f"--out={out}")
  printed = capsys.readouterr().out
  assert "probe_synthetic_clip: computed before" in printed
  assert "photos has no classes with images in both splits: it is left out" in printed


def test_a_grid_has_codes_alone_and_memory_limits_registers(models, tmp_path, monkeypatch, capsys):
  args = *ARGS, "--sources=folder"
  run(study, models["grid"], *args, "--num_tokens=1,16", f"--out={tmp_path / 'grid'}")
  assert list(tables(tmp_path / "grid")["folder"][0]) == ["codes", "codes, random encoder"]

  monkeypatch.setattr(probe, "MAX_BYTES", 4 * (24 + 12) * 2 * 32)
  run(study, models["ordered"], *args, f"--out={tmp_path / 'ordered'}")
  by_tokens, _ = tables(tmp_path / "ordered")["folder"]
  assert by_tokens["registers"][2] and by_tokens["registers"][4] is None and by_tokens["codes"][4]
  assert "registers of more than 2 tokens are left out: 36 images with more do not fit" in capsys.readouterr().out
  assert Image.open(tmp_path / "ordered" / "probe.png").width > 300


def test_bad_input(models, tmp_path):
  args = models["ordered"], f"--out={tmp_path}"
  fails("no evaluation set of photos has classes with images in both splits", study, *args, *ARGS, "--sources=photos")
  fails("--train_images is a flag of the study probe: name it in --study", study, *args, "--train_images=9")
