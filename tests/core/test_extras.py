"""Optional packages: the error message if one is not installed."""

import sys

import numpy as np
import pytest

from flextok_jax.core import extras
from flextok_jax.data.sources import emoji, photos
from flextok_jax.evals.metrics import samples


@pytest.mark.parametrize(
  "module, call, message",
  [
    ("sklearn", lambda: samples.precision_recall(np.eye(8), np.eye(8)), r"recall needs scikit-learn.*\[eval\]"),
    ("fontTools", lambda: emoji.read_glyphs("font.ttf"), r"the source emoji needs fonttools.*\[toy\]"),
    ("skimage", lambda: photos.photo_path("skimage", "coffee.png"), r"coffee.png needs scikit-image.*\[toy\]"),
  ],
)
def test_a_missing_package_is_one_line_naming_its_extra(module, call, message, monkeypatch):
  for name in [name for name in sys.modules if name.partition(".")[0] == module]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(extras.MissingPackageError, match=message) as error:
    call()
  assert len(str(error.value).splitlines()) == 1


def test_import_errors_inside_a_package_are_not_hidden(tmp_path, monkeypatch):
  (tmp_path / "halfway.py").write_text("import nothing_such")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="nothing_such") as error:
    extras.require("halfway", "toy", "a test")
  assert not isinstance(error.value, extras.MissingPackageError)
