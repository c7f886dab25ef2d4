"""What is checked of the inputs of a new run, and which optional sources are left out."""

import pytest

from flextok_jax.config import derive
from flextok_jax.core import errors
from flextok_jax.core.extras import MissingPackageError
from flextok_jax.data.sources import emoji, photos, registry
from flextok_jax.training import checkpoint, inputs
from tests.support import configs


def test_shipped_configs_name_no_images_that_are_not_read():
  for spec in configs.SPECS:
    inputs.check_new(configs.parse(spec))


@pytest.mark.parametrize(
  "kind, settings", [("folder", dict(val_path="/x")), ("emoji", dict(path="/x")), ("tfds", dict(weight=0.0, name="x"))]
)
def test_images_that_are_not_read_are_refused(kind, settings):
  sources = dict(tfds=dict(weight=0.0), synthetic=dict(weight=1.0)) | {kind: settings}
  config = derive(data=dict(sources=sources))
  config.eval.sources = ("synthetic",)
  with pytest.raises(
    ValueError, match=f"data.sources.{kind}.*='/?x' is not read, .*: set data.sources.{kind}.weight=1"
  ):
    inputs.check_new(config)
  config.eval.sources = ("synthetic", kind)
  inputs.check_new(config)
  config.update(stage="distill", data=dict(trajectories="paths"), eval=dict(sources=("synthetic",)))
  inputs.check_new(config)


def test_more_classes_than_the_data_has_are_refused():
  config = derive(stage="ar", ar=dict(num_classes=16, class_names=tuple("abc")))
  with pytest.raises(ValueError, match="have 3 classes, but ar.num_classes is 16: set ar.num_classes=3"):
    inputs.check_new(config)
  for fields in (
    dict(ar=dict(condition="text")),
    dict(ar=dict(num_classes=3)),
    dict(ar=dict(class_names=())),
    dict(init_from="weights of 16 classes"),
  ):
    accepted = config.copy_and_resolve_references()
    accepted.update(fields)
    inputs.check_new(accepted)


@pytest.fixture
def no_font(monkeypatch):
  monkeypatch.setattr(emoji, "FONT_PATHS", ())
  monkeypatch.setattr(errors, "_warned", set())


def mixture(stage="tokenizer", path="", **weights):
  sources = dict(tfds=dict(weight=0.0), emoji=dict(path=path))
  for kind, weight in weights.items():
    sources[kind] = sources.get(kind, {}) | dict(weight=weight)
  return derive(stage=stage, data=dict(sources=sources), eval=dict(sources=tuple(weights)))


def test_optional_sources_that_are_missing_are_left_out_with_one_line(no_font, monkeypatch, caplog):
  config = mixture(synthetic=0.5, emoji=0.5, photos=0.5)
  present = inputs.with_present_sets(inputs.with_present_sources(config))
  assert {kind: source.weight for kind, source in present.data.sources.items() if source.weight} == {
    "synthetic": 0.5,
    "photos": 0.5,
  }
  assert present.eval.sources == ("synthetic", "photos")
  (line,) = (record.getMessage() for record in caplog.records)
  assert line.startswith("source 'emoji' is left out: ") and "fonts-noto-color-emoji" in line and "\n" not in line

  def absent(package, file):
    raise MissingPackageError(package, "toy", file)

  monkeypatch.setattr(photos, "photo_path", absent)
  present = inputs.with_present_sets(inputs.with_present_sources(config))
  assert not present.data.sources.photos.weight and present.eval.sources == ("synthetic",)
  assert "pip install 'flextok-jax[toy]'" in caplog.text


def test_sources_alone_by_path_or_not_read_stay(no_font, caplog):
  shards = mixture(synthetic=0.5, emoji=0.5)
  shards.data.latents = "latents"
  for config in (
    mixture(emoji=1.0),
    mixture(synthetic=0.5, emoji=0.5, path="/absent"),
    shards,
    mixture("ar", emoji=1.0),
  ):
    assert inputs.with_present_sources(config) == config
  for config in (mixture(emoji=1.0), mixture(synthetic=0.5, emoji=0.5, path="/absent"), mixture(synthetic=1.0)):
    assert inputs.with_present_sets(config) == config
  assert not caplog.records
  with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
    inputs.image_data(mixture(emoji=1.0)).open("train")


def test_a_resumed_run_does_not_change_its_sources(monkeypatch, tmp_path):
  config = mixture(synthetic=0.5, emoji=0.5)
  on = lambda present: monkeypatch.setitem(registry.OPTIONAL, "emoji", lambda: None if present else emoji.find_font(""))
  monkeypatch.setattr(emoji, "FONT_PATHS", ())

  def claim(workdir):
    checkpoint.claim_workdir(workdir, inputs.with_present_sources(config, workdir))

  for kind in (True, False):
    on(kind)
    for _ in range(2):
      claim(str(tmp_path / str(kind)))
  with pytest.raises(ValueError, match="trained on source 'emoji', which is missing here: .*fonts-noto-color-emoji"):
    claim(str(tmp_path / "True"))
  on(True)
  with pytest.raises(ValueError, match="is 0.0 there and 0.5 here; .* or set data.sources.emoji.weight=0.0"):
    claim(str(tmp_path / "False"))
