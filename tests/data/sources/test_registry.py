"""Opening sources by name."""

import pytest

from flextok_jax.data.sources.registry import make_source


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="unknown data source 'imagenet'"):
    make_source("imagenet", "train", path="x")
  with pytest.raises(ValueError, match="unknown split 'test'"):
    make_source("synthetic", "test", render_size=16)
