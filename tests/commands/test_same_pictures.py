"""Methods and commands give the same images when all settings come from the checkpoint."""

import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image
import pytest
import skimage.data

import flextok_jax
from flextok_jax import detokenize, sample, tokenize
from tests.support.commands import read_folder, run

ASSETS = Path(flextok_jax.__file__).parent / "assets"
SEED = 7


def to_8bit(images):
  """Converts float images in [-1, 1] to 8 bits as the commands do."""
  return np.round(np.clip((np.asarray(images) + 1) * 127.5, 0, 255)).astype(int)


def assert_same(images, expected):
  """Asserts the same images, 8 bits: a command decodes batches of another size, so a value may round differently."""
  gap = np.abs(np.asarray(images, int) - expected)
  assert gap.max() <= 1 and np.mean(gap > 0) < 1e-3  # measured: 1 of 9,216 values


@pytest.mark.parametrize("name", ["glyphs", "shapes", "shapes_student"])
def test_tokenize_and_detokenize(name, tmp_path):
  checkpoint, pictures = ASSETS / f"{name}.safetensors", tmp_path / "pictures"
  pictures.mkdir()
  for i, picture in enumerate((skimage.data.astronaut(), skimage.data.coffee(), skimage.data.cat())):
    Image.fromarray(picture[:240, :240]).save(pictures / f"{i}.png")
  run(tokenize, f"--checkpoint={checkpoint}", f"--images={pictures}", f"--out={tmp_path / 'tokens.json'}")
  args = f"--checkpoint={checkpoint}", f"--tokens={tmp_path / 'tokens.json'}", f"--seed={SEED}"
  run(detokenize, *args, f"--out={tmp_path / 'out'}")

  model = flextok_jax.load(checkpoint)
  ids = model.tokenize(sorted(pictures.iterdir()))
  assert json.loads((tmp_path / "tokens.json").read_text())["token_ids"] == ids.tolist()
  images = to_8bit(model.detokenize(ids, key=jax.random.key(SEED)))
  written = read_folder(tmp_path / "out")
  assert_same([written[file] for file in sorted(written)], images)
  # The checkpoint's own sampler is used: passing its settings changes nothing; without guidance, or of a student with
  # fewer steps, images differ.
  s = model.config.sampler
  given, other = dict(num_steps=s.num_steps, guidance=s.guidance), dict(num_steps=1)
  if name != "shapes_student":
    assert (s.guidance, s.guidance_scale) == ("cfg", 1.5)
    given, other = given | dict(guidance_scale=s.guidance_scale), dict(guidance="none")
  np.testing.assert_array_equal(to_8bit(model.detokenize(ids, key=jax.random.key(SEED), **given)), images)
  assert (to_8bit(model.detokenize(ids, key=jax.random.key(SEED), **other)) != images).any()


PROMPTS = ["a red star", "two blue rings", "a green square and a yellow circle"]
EMOJI = ["red apple, 3d", "dog face, noto", "cactus, flat"]


@pytest.mark.parametrize(
  "name, tokenizer, flag, condition",
  [
    ("shapes_ar", "shapes", "--classes=3,7,11", dict(labels=[3, 7, 11])),
    ("shapes_ar_stop", "shapes", f"--prompts={';'.join(PROMPTS)}", dict(prompts=PROMPTS)),
    ("glyphs_groups", "glyphs_student", "--classes=face,animal,food", dict(labels=["face", "animal", "food"])),
    ("glyphs_text", "glyphs_student", f"--prompts={';'.join(EMOJI)}", dict(prompts=EMOJI)),
  ],
)
def test_sample(name, tokenizer, flag, condition, tmp_path):
  checkpoint, tokenizer = ASSETS / f"{name}.safetensors", ASSETS / f"{tokenizer}.safetensors"
  gen, model = flextok_jax.load_ar(checkpoint), flextok_jax.load(tokenizer)
  run(
    sample,
    f"--checkpoint={checkpoint}",
    f"--tokenizer={tokenizer}",
    f"--out={tmp_path}",
    flag,
    f"--seed={SEED}",
    "--grid_rows=0",
    "--strip_tokens=0",
  )
  ids = gen.trim(gen.generate(jax.random.key(SEED), **condition))
  assert json.loads((tmp_path / "tokens.json").read_text())["token_ids"] == [row.tolist() for row in ids]
  images = to_8bit(model.detokenize(ids, key=jax.random.key(SEED)))
  written = sorted(tmp_path.glob("*.png"))
  assert len(written) == len(images) == 3
  for path, image in zip(written, images, strict=True):
    assert_same(Image.open(path), image)
  # The checkpoint's own sampling settings are used.
  c = gen.config.ar
  expected = (1.0, 0.25) if name == "glyphs_text" else (2.0, 1.0)
  assert (c.guidance_scale, c.temperature, c.top_k, c.top_p) == (*expected, 0, pytest.approx(0.9))
  given = dict(guidance_scale=c.guidance_scale, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)
  again = gen.trim(gen.generate(jax.random.key(SEED), **condition, **given))
  assert all(np.array_equal(a, b) for a, b in zip(again, ids, strict=True))
