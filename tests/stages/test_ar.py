"""Builders of stage "ar"."""

import jax.numpy as jnp
import pytest

from flextok_jax.config import derive
from flextok_jax.models.perception.t5 import T5Encoder
from flextok_jax.stages.ar import make_text_encoder
from flextok_jax.weights.perception import t5 as t5_files
from tests.support.t5_reference import tensors, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp("t5"), tensors())


def test_make_text_encoder(folder):
  sizes = t5_files.read_sizes(folder)
  encoder = make_text_encoder(derive(text=dict(features=12)), sizes)
  assert isinstance(encoder, T5Encoder) and encoder.dtype == jnp.bfloat16 and encoder.d_ff == 20
  for kwargs, given, words in (
    (dict(), sizes, "text.features=12"),
    (dict(), None, "config.json"),
    (dict(encoder="bytes", features=100), None, "features=100 is not a multiple"),
  ):
    with pytest.raises(ValueError, match=words):
      make_text_encoder(derive(text=kwargs), given)
