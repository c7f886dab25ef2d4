"""python -m flextok_jax.search: files, resuming, processes, bad flags."""

import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

import flextok_jax
from flextok_jax import detokenize, search
from flextok_jax.inference import search as search_lib
from flextok_jax.inference import validation
from tests.support import tiny_generators
from tests.support.commands import ROOT, environment, fails, read_folder, run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  return tiny_generators.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def arguments(saved, tmp_path_factory):
  pictures = tmp_path_factory.mktemp("pictures")
  for i in range(2):
    pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(pictures / f"{i}.png")
  return [
    f"--tokenizer={saved['tokenizer']}", f"--checkpoint={saved['class']}", f"--references={pictures}", "--classes=1,3",
    "--verifier=psnr", "--beam_width=2", "--candidates=3", "--schedule=1,3", "--num_results=2",
  ]  # fmt: skip


def test_results_are_those_of_the_api(saved, arguments, tmp_path, monkeypatch, capsys):
  """Of two processes, and of the parts in which an interrupted search resumes."""
  monkeypatch.setattr(search, "_PER_PART", 1)
  env = environment(1, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  script = (
    "from flextok_jax import cli, search; search._PER_PART = 1; search.define_flags(); "
    "cli.run(lambda: search.main(search.flags.FLAGS))"
  )
  command = ["bash", "launch/local.sh", "2", "python", "-c", script, f"--out={tmp_path / 'out'}", *arguments]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count("searches_0: computed before") == 1 and done.stdout.count("wrote to") == 1
  document = json.loads((tmp_path / "out" / "search.json").read_text())
  assert document["decoded_per_search"] == 3 + 6
  model, gen = flextok_jax.load(saved["tokenizer"]), flextok_jax.load_ar(saved["class"])
  keys = validation.keys(search_lib.jax.random.key(0), 2)
  references = np.stack([np.asarray(Image.open(arguments[2].partition("=")[2] + f"/{i}.png")) for i in range(2)])
  found = gen.search(
    keys, model, "psnr", labels=[1, 3], references=references, beam_width=2, candidates=3, schedule=(1, 3),
    num_results=2,
  )  # fmt: skip
  tokens = json.loads((tmp_path / "out" / "tokens.json").read_text())
  np.testing.assert_array_equal(tokens["token_ids"], found.ids.reshape(4, 3))
  scores = [[result["score"] for result in one["results"]] for one in document["searches"]]
  np.testing.assert_allclose(scores, found.scores, rtol=1e-5)
  assert [one["steps"][0]["token_ids"] for one in document["searches"]] == found.steps[0].ids[:, 0].tolist()
  assert (tmp_path / "out" / "grid.png").exists() and len(list((tmp_path / "out").glob("0*.png"))) == 4

  # Again: what is there is not computed again, and a part that is missing gives the same.
  before = read_folder_of(tmp_path / "out")
  (tmp_path / "out" / "parts" / "searches_1.npz").unlink()
  capsys.readouterr()
  run(search, f"--out={tmp_path / 'out'}", *arguments)
  assert "searches_0: computed before" in capsys.readouterr().out
  for name, picture in read_folder_of(tmp_path / "out").items():
    np.testing.assert_array_equal(picture, before[name])


def read_folder_of(folder):
  return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png")}


def test_other_sizes(saved, arguments, tmp_path):
  """References and pictures have the size, the ids are the generator's; another shape of references is refused."""
  wide = "--size=24,40", "--posemb_scaling=interpolate"
  run(search, f"--out={tmp_path / 'out'}", *arguments, *wide)
  tokens = json.loads((tmp_path / "out" / "tokens.json").read_text())
  assert tokens["sizes"] == [[24, 40]] * 4 and tokens["tokenizer"] == flextok_jax.load(saved["tokenizer"]).fingerprint
  pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").glob("0*.png"))]
  assert {picture.shape for picture in pictures} == {(24, 40, 3)}
  given = f"--tokens={tmp_path / 'out' / 'tokens.json'}", f"--out={tmp_path / 'again'}"
  run(detokenize, arguments[0].replace("tokenizer=", "checkpoint=", 1), *given, "--posemb_scaling=interpolate")
  assert len(read_folder(tmp_path / "again")) == 4
  gen, model = flextok_jax.load_ar(saved["class"]), flextok_jax.load(saved["tokenizer"])
  with pytest.raises(ValueError, match=r"references have \[height, width\] \[16, 16\], and pictures \[8, 16\]"):
    gen.search(
      search_lib.jax.random.key(0), model, "psnr", labels=[1], references=np.zeros((1, 16, 16, 3)), size=(8, 16)
    )
  with pytest.raises(ValueError, match=r"size=\(8, 16\) has no effect without a tokenizer"):
    gen.search(search_lib.jax.random.key(0), labels=[1], size=(8, 16))


def test_without_a_generator(arguments, tmp_path):
  """A search per image; its tokens decode to a picture that is about as near."""
  others = [a for a in arguments if not a.startswith(("--checkpoint", "--classes", "--num_results"))]
  run(search, f"--out={tmp_path / 'out'}", *others)
  document = json.loads((tmp_path / "out" / "search.json").read_text())
  assert len(document["searches"]) == 2 and document["settings"]["checkpoint"] is None
  run(
    detokenize, f"--tokens={tmp_path / 'out' / 'tokens.json'}", f"--checkpoint={arguments[0].partition('=')[2]}",
    f"--out={tmp_path / 'images'}",
  )  # fmt: skip
  assert len(read_folder(tmp_path / "images")) == 2


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--verifier=beauty"], "--verifier=beauty must be one of clip, likelihood"),
    (["--verifier=likelihood,psnr", "--verifier_weights=1"], "--verifier_weights has 1 numbers for 2 verifiers"),
    (["--prompts=a", "--prompts_file=b"], "--prompts and --prompts_file are both given"),
    (["--classes=1,2,4"], "2 references for 3 searches: give one for all, or one for each"),
    (["--num_results=3"], "num_results=3 is more than beam_width=2"),
    (["--schedule=3,1"], r"schedule=\(3, 1\) must be ascending token counts"),
    (["--temperature=1", "--greedy"], "temperature=1.0 has no effect when greedy"),
  ],
)
def test_bad_flags(arguments, tmp_path, flags, words):
  fails(words, search, f"--out={tmp_path / 'out'}", *arguments, *flags)
