"""The tokenize command writing token shards."""

import json

from ml_collections import FrozenConfigDict
import numpy as np
import pytest

from flextok_jax import tokenize
from flextok_jax.config import with_fields
from flextok_jax.data import transforms
from flextok_jax.data.shards.tokens import TokenShards
from flextok_jax.inference.tokenizer import FlexTok, prefix_lengths
from flextok_jax.stages import make_stage
from flextok_jax.weights import fingerprints, loading, saving
from tests.support.commands import config_file, fails, run
from tests.support.tiny import make_params, tiny_config
from tests.support.token_shards import SIZE, TOKENS, make_pictures, records


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  return make_pictures(tmp_path_factory.mktemp("pictures"))


def test_shards_equal_tokenizing_files(pictures, tmp_path, capsys):
  cfg = tiny_config()
  checkpoint = tmp_path / "weights.safetensors"
  saving.save_weights(checkpoint, cfg, make_params(make_stage(cfg)))
  folder = dict(weight=1.0, path=str(pictures), val_path=str(pictures.parent / "validation"))
  file = config_file(tmp_path / "data.py", data=dict(sources=dict(tfds=dict(weight=0.0), folder=folder)))
  given = (f"--checkpoint={checkpoint}", f"--config={file}", f"--out={tmp_path / 'tokens'}")
  run(tokenize, *given, "--shards=2", "--batch_size=8")
  assert "23 records in 2 shards" in capsys.readouterr().out
  run(tokenize, given[0], f"--images={pictures}", f"--out={tmp_path / 'tokens.json'}")
  expected = json.loads((tmp_path / "tokens.json").read_text())["token_ids"]
  read, meta = records(tmp_path / "tokens"), TokenShards(tmp_path / "tokens").meta
  assert [r["ids"] for r in read] == expected and {r["length"] for r in read} == {TOKENS}
  assert meta["fingerprint"] == fingerprints.tokenizer(*loading.load(checkpoint))
  assert (meta["quality"], meta["metric"]) == (None, None)

  run(
    tokenize,
    *given,
    "--split=validation",
    "--num_images=5",
    "--quality=0.3",
    "--num_tokens=3",
    "--batch_size=8",
    "--decoder_steps=3",
    "--decoder_guidance=none",
  )
  read, meta = records(tmp_path / "tokens", "validation"), TokenShards(tmp_path / "tokens", "validation").meta
  images = transforms.load_images(str(pictures.parent / "validation"), SIZE)[0][:5]
  used, params = loading.load(checkpoint)
  used = with_fields(used, {"sampler.num_steps": 3, "sampler.guidance": "none"})
  model = FlexTok(params, FrozenConfigDict(used))
  ids = np.array([r["ids"] for r in read])
  assert ids.shape == (5, 3) and (meta["quality"], meta["metric"]) == (0.3, "mse")
  assert [r["length"] for r in read] == np.asarray(prefix_lengths(model, images, ids, 0.3, "mse")).tolist()

  fails("--config, for shards", tokenize, *given[::2])
  fails("two ways to name images", tokenize, *given, f"--images={pictures}")
  fails(
    "--copies has no meaning for --images", tokenize, given[0], f"--images={pictures}", "--out=x.json", "--copies=2"
  )
  fails("--metric needs --quality", tokenize, *given, "--metric=mse")
  fails("--decoder_steps needs --quality", tokenize, *given, "--decoder_steps=1")
  fails("is a file: give a folder", tokenize, *given[:2], f"--out={checkpoint}")


def test_flags_of_other_modes_are_refused(tmp_path):
  file = config_file(tmp_path / "data.py", data=dict(sources=dict(tfds=dict(weight=0.0), photos=dict(weight=1.0))))
  given = ("--what=images", f"--config={file}", f"--out={tmp_path / 'out'}")
  for flag in ("--copies=2", "--num_tokens=1", "--quality=0.1", "--dtype=bfloat16", "--checkpoint=x"):
    fails(f"{flag.split('=')[0]} has no meaning for --what=images", tokenize, *given, flag)
  fails("--dtype has no meaning for --what=tokens", tokenize, *given[1:], "--checkpoint=x", "--dtype=float16")
  fails("--resize has no meaning for --what=tokens", tokenize, *given[1:], "--checkpoint=x", "--resize=fit")
  fails("--what has no meaning for --images", tokenize, "--what=images", "--images=x", "--out=y.json")
  fails("--checkpoint is missing", tokenize, "--what=latents", *given[1:])
  sources = dict(tfds=dict(weight=0.0), photos=dict(weight=1.0), folder=dict(path="/x"))
  other = f"--config={config_file(tmp_path / 'other.py', data=dict(sources=sources))}"
  fails("data.sources.folder.path='/x' is not read, .*give --data=DIR", tokenize, given[0], other, given[2])
  assert not (tmp_path / "out").exists()
