"""Fixtures of the tests of shards."""

import pytest

from tests.support.token_shards import config, make_pictures, write


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def written(pictures, tmp_path_factory):
  """Returns shards of all pictures, with three copies each in train."""
  out = tmp_path_factory.mktemp("tokens") / "shards"
  write(out, config(pictures), copies=3)
  write(out, config(pictures), split="validation", num_shards=2)
  return out
