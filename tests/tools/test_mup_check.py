"""The coordinate check: only with muP do activations change equally at all widths; bad input."""

import json

import numpy as np
from PIL import Image
import pytest

from flextok_jax import mup_check
from flextok_jax.tools import mup_check as tools_mup_check
from tests.support import token_shards
from tests.support.commands import fails, run

CONFIG = """
from flextok_jax import config as common

def get_config():
  return common.derive(
      stage="ar", dtype="float32",
      ar=dict(width=32, depth=2, head_dim=16, num_ids=IDS, num_tokens=TOKENS, num_classes=3),
      data=dict(tokens=SHARDS, global_batch=16, num_threads=2, prefetch=1), optim=dict(learning_rate=1e-4))
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  """Writes the config of a class-conditional generator of image tokens."""
  root = tmp_path_factory.mktemp("mup")
  token_shards.write(root / "shards", token_shards.config(token_shards.make_pictures(root / "pictures")), num_shards=1)
  text = CONFIG
  for name, value in dict(IDS=token_shards.IDS, TOKENS=token_shards.TOKENS, SHARDS=str(root / "shards")).items():
    text = text.replace(name, repr(value))
  (root / "config.py").write_text(text)
  return root / "config.py"


def test_activations_change_equally_at_all_widths_only_with_mup(config_file, tmp_path, capsys):
  run(mup_check, f"--config={config_file}", "--widths=288,96", "--steps=2", f"--out={tmp_path / 'new' / 'folder'}")
  out = tmp_path / "new" / "folder"
  report = json.loads((out / "coordinates.json").read_text())
  layers = {"ar/readout", *(f"ar/blocks/{i}{part}" for i in range(2) for part in ("", "/attention", "/mlp"))}
  slopes = report["slopes"]
  assert set(slopes["mup"]) == set(slopes["standard"]) == layers
  assert all(abs(slope) < 0.3 for slope in slopes["mup"].values()), slopes
  assert all(slope > 0.4 for slope in slopes["standard"].values()), slopes

  rows = {(row["kind"], row["width"], row["step"]): row for row in report["rows"]}
  assert set(rows) == {
    (kind, width, step) for kind in tools_mup_check.KINDS for width in (96, 288) for step in range(3)
  }
  for (_, width, step), row in rows.items():
    assert set(row["mean_abs"]) == set(row["mean_change"]) == layers
    assert all((change > 0) == (step > 0) for change in row["mean_change"].values())
    if width == report["base_width"] == 96:  # where muP has no effect
      assert row["mean_abs"] == pytest.approx(rows["standard", width, step]["mean_abs"], rel=1e-3)
  picture = np.asarray(Image.open(out / "coordinates.png").convert("RGB"))
  assert picture.shape[0] > 500 and picture.std() > 10
  printed = capsys.readouterr().out
  assert "ar/blocks/1/mlp" in printed and str(out / "coordinates.png") in printed


def test_bad_input_is_one_line(config_file, tmp_path):
  given, out = f"--config={config_file}", f"--out={tmp_path / 'out'}"
  fails("give --config=NAME and --out=DIR", mup_check, given)
  fails("give --config=NAME and --out=DIR", mup_check, out)
  for widths in ("64", "64,64", "64,wide", "0,64", "64,-128"):
    fails(f"--widths={widths} must be two or more widths, like 64,128,256", mup_check, given, out, f"--widths={widths}")
  fails("ar.width 24 is not a multiple of ar.head_dim 16", mup_check, given, out, "--widths=24,32")
  fails("--steps=0: .*", mup_check, given, out, "--steps=0")
  for fields, words in (
    ('stage="vae"', "stage 'vae' has no width: muP is for stages 'tokenizer' and 'ar'"),
    ('data=dict(latents="there")', "the check needs images: data.latents=there must be ''"),
  ):
    (tmp_path / "other.py").write_text(
      f"from flextok_jax import config as common\nget_config = lambda: common.derive({fields})\n"
    )
    fails(words, mup_check, f"--config={tmp_path / 'other.py'}", out)
  (tmp_path / "file").write_text("precious")
  fails("--out=.*file is a file: give a folder", mup_check, given, f"--out={tmp_path / 'file'}")
  fails("cannot write .*below: .*file is a file", mup_check, given, f"--out={tmp_path}/file/below")
  assert not (tmp_path / "out").exists()
