"""Saving with a model card, loading our own saves from folders and the hub, uploads."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import flextok_jax
from flextok_jax.core import hub
from flextok_jax.inference import sharing
from tests.support import numpy_ar
from tests.support.hub_server import HubServer
from tests.support.random_tokenizer import random_model


@pytest.fixture(scope="module")
def model():
  return random_model()


def assert_same(model, other):
  assert model.config == other.config
  jax.tree.map(np.testing.assert_array_equal, model.params, other.params)


def test_save_pretrained_writes_a_card_and_loads_again(model, tmp_path):
  model.save_pretrained(tmp_path / "mine", license="mit", figures={"PSNR at all tokens": 21.5, "a|b": "c"})
  text = (tmp_path / "mine" / "README.md").read_text()
  for part in ("license: mit", "library_name: flextok_jax", "| PSNR at all tokens | 21.5 |", "| a&#124;b | c |"):
    assert part in text
  assert f"| tokens.num_registers | {model.num_registers} |" in text and repr(model) in text
  assert_same(model, flextok_jax.FlexTok.from_pretrained(tmp_path / "mine"))
  assert_same(model, flextok_jax.load(tmp_path, subfolder="mine"))

  (tmp_path / "mine" / "README.md").write_text("my own")
  model.save_pretrained(tmp_path / "mine")
  assert (tmp_path / "mine" / "README.md").read_text() == "my own"
  with pytest.raises(ValueError, match="license='no licence' must be an identifier"):
    model.save_pretrained(tmp_path / "other", license="no licence")
  with pytest.raises(ValueError, match="repository='name' must be the name of a repository"):
    model.save_pretrained(tmp_path / "other", push_to_hub="name")
  assert not (tmp_path / "other").exists()
  with pytest.raises(ValueError, match="revision='v1' is of a repository of the Hugging Face hub"):
    flextok_jax.load(tmp_path / "mine", revision="v1")


def test_generators_have_cards_and_load_from_folders(tmp_path):
  gen = numpy_ar.tiny_generator(condition="class", depth=1)
  gen.save_pretrained(tmp_path / "a" / "b")
  assert 'load_ar("b")' in (tmp_path / "a" / "b" / "README.md").read_text()
  assert_same(gen, flextok_jax.ARGenerator.from_pretrained(tmp_path / "a", subfolder="b"))


SCRIPT = """
import sys
import jax, numpy as np
import flextok_jax
from tests.support import numpy_ar
from tests.support.random_tokenizer import random_model

def same(a, b):
  assert a.config == b.config
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)

model, gen = random_model(), numpy_ar.tiny_generator(condition="class", depth=1)
print(model.push_to_hub("someone/tokenizer", license="mit", figures={"rFID": 1.5}))
same(model, flextok_jax.load("someone/tokenizer"))
gen.push_to_hub("someone/generator", revision="v2", message="second")
same(gen, flextok_jax.load_ar("someone/generator", revision="v2"))
gen.save_pretrained(sys.argv[1], push_to_hub="someone/other")
same(gen, flextok_jax.load_ar("someone/other"))
for call in (lambda: flextok_jax.load("someone/generator", revision="v2"), lambda: flextok_jax.load("someone/none")):
  try:
    call()
  except (ValueError, FileNotFoundError) as e:
    print(type(e).__name__, e)
"""


def test_uploads_and_downloads_by_a_server(tmp_path):
  """Against a local server, by the real client: what is pushed loads again, as a whole and by revision."""
  with HubServer() as server:
    environment = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_test"}
    environment |= {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
      [sys.executable, "-c", SCRIPT, tmp_path / "saved"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{server.address}/someone/tokenizer/commit/")
    assert lines[1].startswith("ValueError") and "load it by flextok_jax.load_ar" in lines[1]
    assert lines[2].startswith("FileNotFoundError someone/none is no file or folder here")
    card = server.files["someone/tokenizer"]["main"]["README.md"].decode()
    assert "license: mit" in card and 'flextok_jax.load("someone/tokenizer")' in card and "| rFID | 1.5 |" in card
    assert set(server.files["someone/generator"]["v2"]) == {"README.md", "config.json", "weights.safetensors"}
    assert not server.files["someone/generator"]["main"]


def test_a_failed_upload_is_one_line(model, monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(OSError, match="the upload to someone/name failed .*: check the name, the network") as error:
    model.push_to_hub("someone/name")
  assert "\n" not in str(error.value)
  assert "FlexTok(" in sharing.card(model, "someone/name", "", {}) and not hub.is_repository("name")
