"""What is checked of the inputs of a new run."""

import pytest

from flextok_jax.config import derive
from flextok_jax.training import inputs
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
