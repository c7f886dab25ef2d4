"""Fixtures of the tests of data sources."""

from absl import logging
import pytest

from flextok_jax.core import errors


@pytest.fixture
def warnings(monkeypatch):
  """The warnings that are logged."""
  lines = []
  monkeypatch.setattr(errors, "_warned", set())
  monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
  return lines
