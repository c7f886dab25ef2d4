"""The sample command on a tiny random generator and a tiny random tokenizer."""

import json
import os

from absl import flags
import jax
import numpy as np
from PIL import Image, ImageOps
import pytest
import skimage.data

from flextok_jax import detokenize, load, load_ar, sample
from flextok_jax.core import files
from flextok_jax.data import transforms
from flextok_jax.evals import grids
from tests.support import tiny_generators
from tests.support.commands import fails, read_folder, run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns paths by name: a tokenizer of 16 px images, 4 registers and 200 codes, and generators for it."""
  return tiny_generators.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pictures")
  Image.fromarray(skimage.data.astronaut()[:90, 100:160]).save(folder / "a.png")
  Image.fromarray(skimage.data.coffee()[:90, 100:160]).save(folder / "b.png")
  return folder


def given(models, name, out, *args):
  return (f"--checkpoint={models[name]}", f"--tokenizer={models['tokenizer']}", f"--out={out}", *args)


def read(folder, name):
  return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def by_class(models, tmp_path_factory):
  """Returns four samples of two classes, drawn in batches of 3."""
  out = tmp_path_factory.mktemp("class")
  run(
    sample,
    *given(
      models,
      "class",
      out,
      "--classes=3,0",
      "--num_samples=2",
      "--batch_size=3",
      "--npz",
      "--seed=5",
      "--guidance_scale=2",
    ),
  )
  return out


@pytest.fixture(scope="module")
def by_text(models, tmp_path_factory):
  """Returns six samples of two prompts, with different lengths."""
  out = tmp_path_factory.mktemp("text")
  (out / "prompts.txt").write_text("A red star!\nzwei Äpfel\n", "utf-8")
  run(sample, *given(models, "text", out, f"--prompts_file={out / 'prompts.txt'}", "--num_samples=3", "--counts=4,1,3"))
  return out


def test_output_files(by_class):
  names = [f"0000{i}_class_{c}.png" for i, c in enumerate((3, 3, 0, 0))]
  others = ["grid.png", "samples.json", "samples.npz", "strip.png", "tokens.json"]
  assert sorted(path.name for path in by_class.iterdir()) == [*names, *others]
  with np.load(by_class / "samples.npz", allow_pickle=False) as arrays:
    assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_0"], [np.asarray(Image.open(by_class / name)) for name in names])
    assert len({image.tobytes() for image in arrays["arr_0"]}) == 4
  report = read(by_class, "samples.json")
  assert report["settings"]["guidance_scale"] == 2 and report["settings"]["seed"] == 5
  assert report["settings"]["top_k"] == 0 and report["settings"]["decoder"]["num_steps"] == 2
  assert [(entry["file"], entry["condition"]) for entry in report["samples"]] == list(zip(names, (3, 3, 0, 0)))
  assert all(entry["length"] == 4 and entry["log_prob"] < 0 for entry in report["samples"])


def test_samples_equal_those_of_the_methods(models, by_class):
  """Equals generate with one key, for any batch size: sample i uses fold_in(key, i)."""
  ids, log_probs = load_ar(models["class"]).generate(
    jax.random.key(5), labels=[3, 3, 0, 0], guidance_scale=2.0, return_log_probs=True
  )
  assert read(by_class, "tokens.json")["token_ids"] == ids.tolist()
  entries = read(by_class, "samples.json")["samples"]
  np.testing.assert_allclose([entry["log_prob"] for entry in entries], log_probs.sum(1), rtol=1e-4)


@pytest.mark.parametrize("name", ["by_class", "by_text"])
def test_detokenize_of_saved_tokens_gives_the_same_images(models, name, request, tmp_path):
  out = request.getfixturevalue(name)
  run(
    detokenize,
    f"--checkpoint={models['tokenizer']}",
    f"--tokens={out / 'tokens.json'}",
    f"--out={tmp_path}",
    f"--seed={read(out, 'samples.json')['settings']['seed']}",
  )
  restored = read_folder(tmp_path)
  assert sorted(restored) == [entry["file"] for entry in read(out, "samples.json")["samples"]]
  for file, image in restored.items():
    np.testing.assert_allclose(image, np.asarray(Image.open(out / file)).astype(int), atol=1)


def test_samples_are_independent_of_batch_and_neighbours(models, by_text, tmp_path):
  run(
    sample,
    *given(
      models,
      "text",
      tmp_path,
      "--prompts=A red star!",
      "--num_samples=2",
      "--batch_size=1",
      "--grid_rows=0",
      "--strip_tokens=0",
    ),
  )
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "00000_a_red_star.png",
    "00001_a_red_star.png",
    "samples.json",
    "tokens.json",
  ]
  assert read(tmp_path, "tokens.json")["token_ids"] == read(by_text, "tokens.json")["token_ids"][:2]
  for name in ("00000_a_red_star.png", "00001_a_red_star.png"):
    one, other = (np.asarray(Image.open(folder / name)).astype(int) for folder in (tmp_path, by_text))
    np.testing.assert_allclose(one, other, atol=1)


def test_lengths_of_a_model_with_stop(by_text):
  tokens, report = read(by_text, "tokens.json"), read(by_text, "samples.json")
  lengths = [len(ids) for ids in tokens["token_ids"]]
  assert [entry["length"] for entry in report["samples"]] == lengths
  assert len(set(lengths)) > 1 and min(lengths) >= 1 and max(map(max, tokens["token_ids"])) < tiny_generators.NUM_CODES
  assert tokens["names"] == ["a_red_star"] * 3 + ["zwei_äpfel"] * 3
  assert [entry["condition"] for entry in report["samples"]] == ["A red star!"] * 3 + ["zwei Äpfel"] * 3


def test_grid_and_strip(models, by_text):
  """A cell shows the sequence cut to the column's length, framed if it is shorter; each row shares one noise."""
  tokens = read(by_text, "tokens.json")["token_ids"]
  grid, tok = np.asarray(Image.open(by_text / "grid.png")).astype(int), load(models["tokenizer"])
  assert grid.shape[1] - 20 < grids.cell_box(0, 3, 16, 16)[2] < grid.shape[1]
  for row, ids in enumerate(tokens):
    left, top, right, bottom = grids.cell_box(row, 0, 16, 16)
    assert (grid[top:bottom, left:right] < 100).any()  # the cell's label
    for column, count in enumerate((1, 3, 4), 1):
      left, top, right, bottom = grids.cell_box(row, column, 16, 16)
      cell = grid[top:bottom:6, left:right:6]
      assert (grid[top - 2, left:right] == 255).all() == (count <= len(ids))
      noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), row), tok.latent_shape)
      image = np.asarray(tok.detokenize([ids[:count]], noise=noise[None], num_steps=2, guidance="none"))[0]
      np.testing.assert_allclose(cell, (image.clip(-1, 1) + 1) * 127.5, atol=1.01)
  whole = np.asarray(Image.open(by_text / "00000_a_red_star.png"))
  strip = np.asarray(Image.open(by_text / "strip.png"))
  left, top, right, bottom = grids.cell_box(0, len(tokens[0]) - 1, 16, 16, apart=False)
  np.testing.assert_array_equal(strip[top:bottom:6, left:right:6], whole)
  assert 0 < strip.shape[1] - right < 20


def test_prefix_tokens_of_images_are_kept(models, pictures, tmp_path):
  run(
    sample,
    *given(
      models,
      "none",
      tmp_path,
      f"--prefix_images={pictures}",
      "--prefix_tokens=2",
      "--num_samples=2",
      "--num_tokens=3",
      "--counts=1,3",
      "--temperature=1.5",
      "--top_k=50",
      "--top_p=0.9",
    ),
  )
  tokens, tok = read(tmp_path, "tokens.json"), load(models["tokenizer"])
  ids = np.array(tokens["token_ids"])
  real = np.asarray(tok.tokenize([pictures / "a.png", pictures / "b.png"], 2)).repeat(2, axis=0)
  assert ids.shape == (4, 3) and tokens["names"] == ["a", "a", "b", "b"]
  np.testing.assert_array_equal(ids[:, :2], real)
  assert len(set(ids[:, 2].tolist())) > 1
  entries = read(tmp_path, "samples.json")["samples"]
  assert [(entry["prefix_image"], entry["prefix_tokens"]) for entry in entries] == [
    ("a.png", 2),
    ("a.png", 2),
    ("b.png", 2),
    ("b.png", 2),
  ]
  grid = np.asarray(Image.open(tmp_path / "grid.png"))
  left, top, right, bottom = grids.cell_box(2, 1, 16, 16)  # labels, originals, 1, 3
  np.testing.assert_array_equal(grid[top:bottom:6, left:right:6], transforms.center_crop(pictures / "b.png", 16))


def test_unconditional_and_greedy_sampling(models, tmp_path):
  args = ("--greedy", "--num_samples=2", "--grid_rows=0", "--strip_tokens=0", "--num_tokens=2")
  run(sample, *given(models, "class", tmp_path, *args))
  one, other = read(tmp_path, "tokens.json")["token_ids"]
  assert one == other and len(one) == 2
  one, other = (np.asarray(Image.open(tmp_path / f"0000{i}_unconditional.png")) for i in range(2))
  assert (one != other).any()  # the decoder's noise
  assert read(tmp_path, "samples.json")["settings"]["guidance_scale"] == 1


def test_names_of_samples_are_names_of_files(tmp_path):
  for image in ("n" * 300 + ".png", "é" * 200, os.fsdecode(b"caf\xe9.png"), None):
    name = sample.Sample("Ä" * 99, image, 2, 0).name
    files.write_file(tmp_path / f"00000_{name}.png", b"x")


def test_grid_rows_are_divided_among_the_conditions():
  assert sample._shown(16, 1, 5) == [0, 1, 2, 3, 4]
  assert sample._shown(4, 8, 16) == [0, 1, 8, 9]
  assert sample._shown(3, 2, 10) == [0, 2, 4]
  assert sample._shown(0, 2, 10) == []


def test_grid_labels_fit_their_cells():
  images = np.zeros((4, 16, 16, 3), np.uint8)
  texts = ["short", "many words " * 20, "onelongword" * 9, "ein Löffel, çà et là, …\nlast line"]
  grid = np.asarray(grids.grid([texts, images], ["", "1"])).astype(int)
  for row in range(4):
    left, top, right, bottom = grids.cell_box(row, 0, 16, 16)
    assert (grid[top:bottom, left:right] < 100).any()
    assert (grid[top:bottom, : left - 1] == 255).all() and (grid[bottom : bottom + 2, left:right] == 255).all()
    assert (grid[top:bottom, right + 1 : grids.cell_box(row, 1, 16, 16)[0]] == 255).all()


def test_other_sizes(models, pictures, tmp_path):
  """Samples that begin with the tokens of pictures of the same shape; detokenize writes the same images."""
  wide = "--size=24,40", "--posemb_scaling=interpolate"
  prefix = f"--prefix_images={pictures}", "--prefix_tokens=2"
  run(sample, *given(models, "class", tmp_path / "out", "--classes=1", "--npz", *prefix, *wide))
  with np.load(tmp_path / "out" / "samples.npz") as arrays:
    images = arrays["arr_0"]
  assert images.shape == (2, 24, 40, 3) and read(tmp_path / "out", "samples.json")["settings"]["size"] == [24, 40]
  tokens = read(tmp_path / "out", "tokens.json")
  assert tokens["sizes"] == [[24, 40]] * 2 and tokens["tokenizer"] == load(models["tokenizer"]).fingerprint
  model = load(models["tokenizer"], posemb_scaling="interpolate")
  expected = model.detokenize(tokens["token_ids"], key=jax.random.key(0), size=(24, 40))
  np.testing.assert_allclose(images / 127.5 - 1, np.clip(expected, -1, 1), atol=1.01 / 127.5)
  picture = ImageOps.fit(Image.open(pictures / "a.png"), (40, 24), Image.Resampling.BILINEAR)
  assert tokens["token_ids"][0][:2] == model.tokenize(np.asarray(picture)[None], 2)[0].tolist()
  run(
    detokenize,
    f"--checkpoint={models['tokenizer']}",
    f"--tokens={tmp_path / 'out' / 'tokens.json'}",
    f"--out={tmp_path / 'again'}",
    "--posemb_scaling=interpolate",
  )
  again = read_folder(tmp_path / "again")
  assert len(again) == 2
  for written, image in zip(sorted((tmp_path / "again").iterdir()), images):
    np.testing.assert_array_equal(np.asarray(Image.open(written)), image)
  fails("6 x 10 patches", sample, *given(models, "class", tmp_path / "bad", "--size=24,40"))


@pytest.mark.parametrize(
  "model, args, pattern",
  [
    ("class", ["--classes=5"], "class 5 is out of range: classes are 0 to 4"),
    ("class", ["--classes=-1"], "class -1 is out of range"),
    ("class", ["--classes=cat"], "class cat is out of range"),
    ("class", ["--classes="], "--classes is empty"),
    ("class", ["--prompts=a"], "condition 'class': it takes classes"),
    ("class", ["--classes=1", "--prompts=a"], "--classes and --prompts are both given"),
    ("class", ["--guidance_scale=3"], "guidance_scale=3.0 has no effect without"),
    ("class", ["--classes=1", "--num_tokens=5"], "--num_tokens=5 is out of range: this model has 1 to 4"),
    ("class", ["--classes=1", "--num_tokens=2", "--counts=1,4"], "4 in --counts is out of range: .* 1 to 2"),
    ("class", ["--counts=one"], "one in --counts is out of range"),
    ("class", ["--temperature=0"], "temperature=0.0 must be a number from 1e-06"),
    ("class", ["--top_k=201"], "top_k=201 must be a whole number from 0 to 200"),
    ("class", ["--greedy", "--top_k=3"], "top_k=3 has no effect when greedy"),
    ("class", ["--prefix_tokens=2"], "--prefix_images is missing"),
    ("class", ["--prefix_images=x.png"], "--prefix_tokens is missing"),
    ("class", ["--prefix_images=x.png", "--prefix_tokens=4"], "--prefix_tokens=4 leaves nothing to draw of 4"),
    ("class", ["--prefix_images=x.png", "--prefix_tokens=2"], "the image x.png does not exist"),
    ("class", ["--decoder_scale=2"], "--decoder_scale=2.0 has no effect where guidance is .none."),
    ("class", ["--decoder_scale=nan", "--decoder_guidance=cfg"], "--decoder_scale=nan must be a finite number"),
    ("class", ["--setting=dim=64"], "no setting like 'dim' can be given"),
    ("class", ["--setting=dim"], "--setting=dim must be name=value"),
    ("class", ["--seed=-1"], "seed=-1 must be a whole number from 0 to 4294967295"),
    ("text", ["--classes=1"], "condition 'text': it takes prompts"),
    ("text", ["--prompts=a;;b"], "prompt 2 of --prompts is empty"),
    ("text", ["--prompts_file=absent.txt"], "absent.txt"),
    ("none", ["--prompts=a"], "it takes neither classes nor prompts"),
    ("foreign", [], "ids of the tokenizer 0123456789abcdef, but tokenizer=.* is [0-9a-f]{16}: give the tokenizer"),
    ("other_codes", [], "up to 4 tokens of 240 ids, tokenizer=.* takes 4 of 200: give the tokenizer"),
    ("longer", [], "up to 8 tokens of 200 ids, tokenizer=.* takes 4 of 200"),
    ("tokenizer", [], "is a model of stage 'tokenizer', not a generator"),
  ],
)
def test_bad_input_is_a_one_line_error(models, tmp_path, model, args, pattern):
  fails(pattern, sample, *given(models, model, tmp_path / "out", *args))
  assert not (tmp_path / "out").exists()


def test_more_bad_input_is_refused(models, tmp_path):
  full = given(models, "none", tmp_path / "out")
  for i, name in enumerate(("checkpoint", "tokenizer", "out")):
    fails(f"--{name} is missing", sample, *full[:i], *full[i + 1 :])
  fails("is a file", sample, *full[:2], f"--out={models['none']}")
  fails("is a generator: load it by flextok_jax.load_ar", sample, full[0], f"--tokenizer={models['none']}", full[2])
  fails("absent", sample, "--checkpoint=absent", *full[1:])
  (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1"))
  fails("is no text in UTF-8", sample, *full, f"--prompts_file={tmp_path / 'latin.txt'}")
  for arg in (
    "--top_p=1.5",
    "--top_p=-0.1",
    "--batch_size=0",
    "--num_samples=0",
    "--num_tokens=0",
    "--decoder_steps=0",
    "--decoder_guidance=strong",
    "--prefix_tokens=0",
    "--temperature=-1",
    "--top_k=-1",
  ):
    with pytest.raises(flags.Error, match=arg.partition("=")[0].lstrip("-")) as caught:  # as cli.run prints it
      run(sample, *full, arg)
    assert len(str(caught.value).splitlines()) == 1
  assert not (tmp_path / "out").exists()
