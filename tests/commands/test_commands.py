"""The evaluate, tokenize and detokenize commands on a tiny random model."""

import json
import os
import shutil

import jax
import numpy as np
from PIL import Image
import pytest
import skimage.data

import flextok_jax
from flextok_jax import detokenize, evaluate, tokenize
from flextok_jax.core import files, progress
from flextok_jax.inference import token_files
from flextok_jax.stages import make_stage
from flextok_jax.weights import saving
from tests.support.commands import config_file, fails, read_folder, run, shell
from tests.support.tiny import make_params, tiny_config

NUM_CODES = 8 * 5 * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Returns the path of a tokenizer of 16 px images, 4 registers and 200 codes."""
  config = tiny_config(eval=dict(sources=("synthetic",), num_images=3, batch_size=2, grid_images=2))
  path = tmp_path_factory.mktemp("model") / "weights.safetensors"
  saving.save_weights(str(path), config, make_params(make_stage(config)))
  return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
  config = tiny_config(
    stage="vae", vae=dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(32,), layers_per_block=1)
  )
  path = tmp_path_factory.mktemp("vae") / "weights.safetensors"
  saving.save_weights(str(path), config, make_params(make_stage(config)))
  return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """Returns a folder of five photographs, one of them in a subfolder."""
  folder = tmp_path_factory.mktemp("pictures")
  (folder / "more").mkdir()
  picture = skimage.data.astronaut()
  for i, name in enumerate(("a", "b", "c", "d", "more/e")):
    Image.fromarray(picture[40 * i : 40 * i + 50, 100:160]).save(folder / f"{name}.png")
  return folder


@pytest.fixture(scope="module")
def tokens(model, pictures, tmp_path_factory):
  path = tmp_path_factory.mktemp("tokens") / "tokens.json"
  run(tokenize, f"--checkpoint={model}", f"--images={pictures}", f"--out={path}", "--batch_size=3")
  return path


@pytest.fixture(scope="module")
def decoded(model, tokens):
  """Returns the images decoded from all tokens, by file name."""
  run(detokenize, f"--checkpoint={model}", f"--tokens={tokens}", f"--out={tokens.parent / 'decoded'}")
  return read_folder(tokens.parent / "decoded")


def write(path, **fields):
  path.write_text(json.dumps(fields))
  return path


def test_tokenize_folder(tokens):
  fields = json.loads(tokens.read_text())
  assert fields["image_size"] == 16 and fields["num_tokens"] == 4
  assert fields["names"] == ["a.png", "b.png", "c.png", "d.png", "more/e.png"]
  ids = np.array(fields["token_ids"])
  assert ids.shape == (5, 4) and ids.min() >= 0 and ids.max() < NUM_CODES
  assert len({tuple(row) for row in ids}) > 1
  assert [path.name for path in tokens.parent.iterdir() if path.is_file()] == ["tokens.json"]


def test_tokenize_options(model, pictures, tokens, tmp_path):
  whole = json.loads(tokens.read_text())["token_ids"]
  out = tmp_path / "tokens.npz"
  files = f"{pictures / 'more'},{pictures / 'b.png'}"
  run(tokenize, f"--checkpoint={model}", f"--images={files}", f"--out={out}", "--num_tokens=2")
  with np.load(out, allow_pickle=False) as arrays:
    np.testing.assert_array_equal(arrays["token_ids"], [whole[4][:2], whole[1][:2]])
    assert arrays["token_ids"].dtype == np.int32
    assert arrays["names"].tolist() == ["e.png", str(pictures / "b.png")]
    assert arrays["num_tokens"] == 2 and arrays["image_size"] == 16


def test_round_trip_in_user_processes(model, pictures, tokens, decoded, tmp_path):
  file = tmp_path / os.fsdecode(b"caf\xe9.json")
  code, out, err = shell("flextok_jax.tokenize", f"--checkpoint={model}", f"--images={pictures}", f"--out={file}")
  assert (code, err) == (0, "") and "5 images of 16 px, 4 tokens each" in out
  assert file.read_text() == tokens.read_text()
  code, out, err = shell(
    "flextok_jax.detokenize", f"--checkpoint={model}", f"--tokens={file}", f"--out={tmp_path / 'out'}", "--batch_size=2"
  )
  assert (code, err) == (0, "") and "5 images of 16 px" in out
  assert sorted(decoded) == ["00000_a.png", "00001_b.png", "00002_c.png", "00003_d.png", "00004_e.png"]
  assert len({image.tobytes() for image in decoded.values()}) == 5
  for name, image in read_folder(tmp_path / "out").items():
    assert image.shape == (16, 16, 3)
    np.testing.assert_allclose(image, decoded[name], atol=1)  # an image's noise does not depend on its batch


def test_tokenize_leaves_out_broken_files_and_detokenize_reads_all_names(
  model, pictures, tokens, tmp_path, capsys, caplog
):
  expected, folder = json.loads(tokens.read_text()), tmp_path / "pictures"
  folder.mkdir()
  names = [b"a.png", b"caf\xe9.png", b"n" * 251 + b".png", b"z.png"]
  for name, other in zip(names, "abcd"):
    (folder / os.fsdecode(name)).write_bytes((pictures / f"{other}.png").read_bytes())
  for name in ("0.png", "b.png", "z1.png"):
    (folder / name).write_bytes(b"broken")
  os.mkfifo(folder / "fifo.png")
  for suffix in ("json", "npz"):
    out = tmp_path / f"t.{suffix}"
    given = tokenize, f"--checkpoint={model}", f"--images={folder}", f"--out={out}", "--batch_size=2"
    fails(f"[34] of [78] images are unreadable, .*max_unreadable=0.01: .*; {out} has the others", *given)
    printed = capsys.readouterr().out
    assert "4 images of 16 px, 4 tokens each; " in printed and " are left out, the first: " in printed
    assert all(f"{name} cannot be read" in caplog.text for name in ("0.png", "b.png", "z1.png"))
    caplog.clear()
    read, ids, _ = token_files.read_tokens(
      out, token_files.Facts(flextok_jax.load(model).fingerprint, 16, 4), NUM_CODES
    )
    assert read == ["a.png", "caf\\xe9.png", "n" * 251 + ".png", "z.png"]
    np.testing.assert_array_equal(ids, expected["token_ids"][:4])
    run(detokenize, f"--checkpoint={model}", f"--tokens={out}", f"--out={tmp_path / suffix}", "--num_steps=1")
    assert len(list((tmp_path / suffix).iterdir())) == 4
  assert not [path for path in tmp_path.iterdir() if path.suffix in (".part", ".tmp")]


def test_tokenize_goes_on_where_it_was_stopped(model, pictures, tokens, tmp_path, capsys, monkeypatch):
  folder, out, part = tmp_path / "pictures", tmp_path / "t.json", tmp_path / "t.json.part"
  for i in range(4):
    shutil.copytree(pictures, folder / str(i))
  (folder / "0" / "a.png").write_bytes(b"broken")
  given = (f"--checkpoint={model}", f"--images={folder}", f"--out={out}", "--batch_size=8")

  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(progress.Bar, "__call__", stop)  # after the first batch
  with pytest.raises(KeyboardInterrupt):
    run(tokenize, *given)
  monkeypatch.undo()
  assert not out.exists()
  with open(part, "ab") as file:
    file.write(b'["half a li')
    files.lock(file)
    fails("another run writes .*t.json", tokenize, *given)
  (folder / "1" / "b.png").touch()  # the seventh: it may be another picture now
  run(tokenize, *given)
  assert f"6 of 20 images are done already, from {part}" in capsys.readouterr().out and not part.exists()
  fields, expected = json.loads(out.read_text()), json.loads(tokens.read_text())
  assert fields["token_ids"] == (expected["token_ids"] * 4)[1:]
  assert fields["names"] == [f"{i}/{name}" for i in range(4) for name in expected["names"]][1:]


def test_pictures_of_other_shapes(model, tmp_path, capsys, caplog):
  """Tokens and images are those of the methods, at the sizes that the token file says."""
  folder = tmp_path / "pictures"
  folder.mkdir()
  picture = skimage.data.astronaut()
  for i, (height, width) in enumerate(((16, 32), (48, 24), (20, 20), (12, 24), (16, 30))):
    Image.fromarray(picture[40 * i : 40 * i + height, 100 : 100 + width]).save(folder / f"{i}.png")
  paths = [str(path) for path in sorted(folder.iterdir())]
  scaled = flextok_jax.load(model, posemb_scaling="scaled")
  given = (f"--checkpoint={model}", f"--images={folder}", "--batch_size=2")
  fit = (*given, "--resize=fit")
  fails("3 x 6 patches does not fit max_grid 4.*'scaled'", tokenize, *fit, f"--out={tmp_path / 't.json'}")
  (tmp_path / "t.json.part").unlink()
  ids, sizes = np.asarray(scaled.tokenize(paths, resize="fit")), [[12, 24], [24, 12], [16, 16], [12, 24], [12, 20]]
  for name in ("t.json", "t.npz"):
    run(tokenize, *fit, "--posemb_scaling=scaled", f"--out={tmp_path / name}")
    assert "5 images of about 16 x 16 px, 4 tokens each" in capsys.readouterr().out
  fields = json.loads((tmp_path / "t.json").read_text())
  assert fields["sizes"] == sizes and fields["token_ids"] == ids.tolist()
  with np.load(tmp_path / "t.npz") as arrays:
    np.testing.assert_array_equal(arrays["sizes"], sizes)
    np.testing.assert_array_equal(arrays["token_ids"], ids)
  given_tokens = (f"--checkpoint={model}", f"--tokens={tmp_path / 't.npz'}", f"--out={tmp_path / 'out'}")
  fails("use the checkpoint that wrote them, with the same posemb_scaling", detokenize, *given_tokens)
  large = write(tmp_path / "large.json", token_ids=[[1]], sizes=[[12, 24]])
  fails("grid of 3 x 6 patches does not fit", detokenize, given[0], f"--tokens={large}", given_tokens[2])
  run(detokenize, *given_tokens, "--posemb_scaling=scaled")
  for i, (name, image) in enumerate(sorted(read_folder(tmp_path / "out").items())):
    key = jax.random.fold_in(jax.random.key(0), i)
    expected = scaled.detokenize(ids[i : i + 1], size=tuple(sizes[i]), key=key[None])
    assert name == f"{i:05d}_{i}.png" and image.shape == (*sizes[i], 3)
    np.testing.assert_allclose(image, np.asarray(flextok_jax.to_pil(expected)[0], int), atol=1)

  # As they are, with as many tokens as they need.
  own = (*given, "--resize=none", "--posemb_scaling=scaled", "--quality=0.2", "--decoder_steps=1")
  run(tokenize, *own, f"--out={tmp_path / 'own.json'}")
  assert "4 images of their own size, up to 4 tokens; 1 of 5 are left out" in capsys.readouterr().out
  assert "4.png has a size that cannot be used: images of 16 x 30 pixels: sides must be multiples of 4" in caplog.text
  fields = json.loads((tmp_path / "own.json").read_text())
  assert fields["sizes"] == [[16, 32], [48, 24], [20, 20], [12, 24]]
  short = scaled.tokenize(paths[:4], resize="none", quality=0.2, num_steps=1)
  assert fields["token_ids"] == [row.tolist() for row in short]
  fails("of a quality, are written to .json files", tokenize, *own, f"--out={tmp_path / 'own.npz'}")


def test_detokenize_ragged_and_handwritten_token_files(model, tokens, decoded, tmp_path):
  """A short sequence decodes like a longer one cut to its length; tokens past the cut have no effect."""
  ids = json.loads(tokens.read_text())["token_ids"]
  ragged = write(tmp_path / "ragged.json", token_ids=[ids[0][:1], ids[1][:3], ids[2]])
  names = ["../../x.jpg", "/x.png", "folder/y"]  # all are written inside --out
  tails = write(tmp_path / "tails.json", token_ids=[[ids[0][0], 7, 8, 9], [*ids[1][:3], 11], ids[2]], names=names)
  run(detokenize, f"--checkpoint={model}", f"--tokens={ragged}", f"--out={tmp_path / 'ragged'}")
  run(detokenize, f"--checkpoint={model}", f"--tokens={tails}", f"--out={tmp_path / 'one'}", "--num_tokens=1")
  short, one = read_folder(tmp_path / "ragged"), read_folder(tmp_path / "one")
  assert sorted(short) == ["00000_0.png", "00001_1.png", "00002_2.png"]
  assert sorted(one) == ["00000_x.png", "00001_x.png", "00002_y.png"]
  np.testing.assert_array_equal(short["00000_0.png"], one["00000_x.png"])
  np.testing.assert_allclose(short["00002_2.png"], decoded["00002_c.png"], atol=1)
  assert (abs(short["00000_0.png"] - decoded["00000_a.png"]) > 1).any()


@pytest.mark.parametrize("args", [("--seed=1",), ("--num_steps=3",), ("--guidance=cfg", "--guidance_scale=3")])
def test_sampler_flags_and_seed_take_effect(model, tokens, decoded, tmp_path, args):
  run(detokenize, f"--checkpoint={model}", f"--tokens={tokens}", f"--out={tmp_path}", *args)
  images = read_folder(tmp_path)
  assert images.keys() == decoded.keys()
  assert all((abs(image - decoded[name]) > 1).any() for name, image in images.items())


def test_detokenize_rejects_bad_input(model, vae, tokens, tmp_path):
  given = (f"--checkpoint={model}", f"--tokens={tokens}", f"--out={tmp_path / 'out'}")
  fails("--tokens is missing", detokenize, given[0], given[2])
  fails("no token file at .*absent.json", detokenize, given[0], "--tokens=absent.json", given[2])
  fails("must end in .json or .npz", detokenize, given[0], "--tokens=tokens.txt", given[2])
  fails("num_tokens=0 is out of range", detokenize, *given, "--num_tokens=0")
  fails("num_tokens=5 is out of range", detokenize, *given, "--num_tokens=5")
  short = write(tmp_path / "short.json", token_ids=[[1, 2], [3]])
  fails(
    r"num_tokens=2, but token_ids\[1\] has only 1",
    detokenize,
    given[0],
    f"--tokens={short}",
    given[2],
    "--num_tokens=2",
  )
  fails("num_steps=0", detokenize, *given, "--num_steps=0")
  fails("unknown guidance .strong.: one of apg, cfg, none", detokenize, *given, "--guidance=strong")
  fails("guidance_scale=nan must be", detokenize, *given, "--guidance=cfg", "--guidance_scale=nan")
  fails("guidance_scale=2.0 has no effect", detokenize, *given, "--guidance=none", "--guidance_scale=2")
  fails("batch_size=0", detokenize, *given, "--batch_size=0")
  fails("seed=-1", detokenize, *given, "--seed=-1")
  fails("stage 'vae', which has no tokens", detokenize, f"--checkpoint={vae}", *given[1:])
  fails("is a file", detokenize, *given[:2], f"--out={short}")
  fails("cannot write .*x: .*short.json is a file", detokenize, "--checkpoint=absent", given[1], f"--out={short / 'x'}")
  fails("--out=gs://b/x is in a bucket.*give a local path", detokenize, *given[:2], "--out=gs://b/x")
  fails("--out='s3://b/x' cannot be used: give a folder", detokenize, *given[:2], "--out=s3://b/x")
  bad = write(tmp_path / "bad.json", token_ids=[[1], [2]], names=["a", "b\0" * 10**5])
  fails(r"names\[1\] is 'b.x00b", detokenize, given[0], f"--tokens={bad}", given[2])
  fails("absent", detokenize, "--checkpoint=absent", *given[1:])
  assert not (tmp_path / "out").exists()


def test_tokenize_rejects_bad_input(model, vae, pictures, tmp_path):
  given = (f"--checkpoint={model}", f"--images={pictures}", f"--out={tmp_path / 'new.json'}")
  fails("--checkpoint is missing", tokenize, *given[1:])
  fails("absent.png", tokenize, given[0], "--images=absent.png", given[2])
  (tmp_path / "empty").mkdir()
  fails("empty", tokenize, given[0], f"--images={tmp_path / 'empty'}", given[2])
  (tmp_path / "broken.png").write_bytes(b"not a picture")
  fails("broken.png", tokenize, given[0], f"--images={tmp_path / 'broken.png'}", given[2])
  fails("num_tokens=0 must be a whole number from 1 to 4", tokenize, *given, "--num_tokens=0")
  fails("num_tokens=5 must", tokenize, *given, "--num_tokens=5")
  fails("must end in .json or .npz", tokenize, *given[:2], "--out=tokens.txt")
  fails("batch_size=0", tokenize, *given, "--batch_size=0")
  fails("stage 'vae', which has no tokens", tokenize, f"--checkpoint={vae}", *given[1:])
  fails("cannot write", tokenize, *given[:2], f"--out={pictures / 'a.png' / 'x.json'}")
  assert not (tmp_path / "new.json").exists()


def test_evaluate_with_checkpoint_settings_and_with_overrides(model, pictures, tmp_path, capsys):
  out = tmp_path / "eval"
  run(evaluate, f"--checkpoint={model}", f"--workdir={tmp_path}")
  printed = capsys.readouterr().out
  names = ["curve.png", "eval.jsonl", "grid_synthetic.png", "report.json"]
  assert sorted(path.name for path in out.iterdir()) == names
  assert all(str(out / name) in printed for name in names) and "synthetic, 3 images" in printed
  report = json.loads((out / "report.json").read_text())
  assert list(report["sets"]["synthetic"]["by_tokens"]) == ["1", "2", "4"]
  assert report["sets"]["synthetic"]["num_images"] == 3 and report["checkpoint"] == str(model)

  Image.new("RGB", (20, 20)).save(tmp_path / "train.png")
  config = config_file(
    tmp_path / "other.py",
    tokens=dict(num_registers=4, levels=(8, 5, 5), nested_dropout="pow2"),
    data=dict(sources=dict(folder=dict(path=str(tmp_path), val_path=str(pictures)))),
  )
  run(
    evaluate,
    f"--checkpoint={model}",
    f"--config={config}",
    "--sources=folder",
    "--num_tokens=3,1",
    "--num_images=2",
    "--seed=7",
    f"--out={out}",
  )
  lines = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
  assert len(lines) == 2 and lines[0] == report and lines[1]["seed"] == 7
  assert {k: list(v["by_tokens"]) for k, v in lines[1]["sets"].items()} == {"folder": ["1", "3"]}
  assert lines[1]["sets"]["folder"]["num_images"] == 2


def test_evaluate_pictures_of_other_shapes(model, tmp_path):
  folder = tmp_path / "pictures"
  folder.mkdir()
  picture = skimage.data.astronaut()
  for i, (height, width) in enumerate(((24, 48), (48, 24), (32, 64))):
    Image.fromarray(picture[40 * i : 40 * i + height, 100 : 100 + width]).save(folder / f"{i}.png")
  shutil.copytree(folder, tmp_path / "train")
  config = config_file(
    tmp_path / "data.py",
    tokens=dict(num_registers=4, levels=(8, 5, 5), nested_dropout="pow2"),
    data=dict(sources=dict(folder=dict(path=str(tmp_path / "train"), val_path=str(folder)))),
  )
  given = (f"--checkpoint={model}", f"--config={config}", "--sources=folder", "--num_tokens=4", "--metrics=psnr")
  fails("does not fit max_grid 4", evaluate, *given, "--resize=fit", f"--out={tmp_path / 'no'}")
  for resize, sizes in (("fit", {"12x24": 2, "24x12": 1}), ("none", {"24x48": 1, "48x24": 1, "32x64": 1})):
    out = tmp_path / resize
    run(evaluate, *given, f"--resize={resize}", "--posemb_scaling=interpolate", f"--out={out}")
    report = json.loads((out / "report.json").read_text())
    assert report["sets"]["folder"]["sizes"] == sizes and report["resize"] == resize
    assert report["sets"]["folder"]["num_images"] == 3
    with Image.open(out / "grid_folder.png") as grid:
      assert grid.width > 100
  Image.new("RGB", (30, 16)).save(folder / "0.png")
  fails(
    "has 16 x 30 pixels: sides must be multiples of 4; resize='fit' makes them so",
    evaluate,
    *given,
    "--resize=none",
    "--posemb_scaling=interpolate",
    f"--out={tmp_path / 'no'}",
  )


def test_evaluate_rejects_the_config_of_another_model(model, tmp_path):
  other = config_file(tmp_path / "other.py", tokens=dict(num_registers=8, levels=(8, 5, 5)))
  fails(
    "tokens.num_registers = 8, but the checkpoint was trained with 4",
    evaluate,
    f"--checkpoint={model}",
    f"--config={other}",
    f"--out={tmp_path / 'no'}",
  )


def test_evaluate_rejects_bad_input(model, vae, pictures, tmp_path):
  given = (f"--checkpoint={model}", f"--out={tmp_path / 'out'}")
  fails("give --workdir or --checkpoint", evaluate, given[1])
  fails("give --out or --workdir", evaluate, given[0])
  fails("absent", evaluate, "--checkpoint=absent", given[1])
  fails("--num_tokens: eval.num_tokens must be .* got .0, 1.", evaluate, *given, "--num_tokens=0,1")
  fails("num_tokens=5 is out of range", evaluate, *given, "--num_tokens=5")
  fails("whole numbers separated by commas, got 'x'", evaluate, *given, "--num_tokens=1,x")
  fails("eval.sources must be .*'mars'", evaluate, "--checkpoint=/absent", given[1], "--sources=mars")
  fails("num_images=0: 0 is not a positive integer", evaluate, *given, "--num_images=0")
  fails("--num_tokens has no meaning", evaluate, f"--checkpoint={vae}", given[1], "--num_tokens=1")
  fails("is a file", evaluate, given[0], f"--out={pictures / 'a.png'}")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "args, pattern",
  [
    (("evaluate", "--num_tokens=0"), "--num_tokens: eval.num_tokens must be a tuple of whole numbers from 1 to "),
    (("tokenize", "--images=absent.png", "--out=x.json"), "absent.png"),
    (("detokenize", "--tokens=absent.json", "--num_steps=many"), "num_steps"),
  ],
)
def test_bad_input_prints_one_line_and_exits_with_code_1(model, tmp_path, args, pattern):
  out = () if args[0] == "tokenize" else (f"--out={tmp_path}",)
  code, printed, err = shell(f"flextok_jax.{args[0]}", f"--checkpoint={model}", *args[1:], *out)
  assert (code, printed) == (1, "")
  assert err.startswith("error: ") and pattern in err and len(err.splitlines()) == 1
