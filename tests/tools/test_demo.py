"""python -m flextok_jax.demo: what its page computes, the page over HTTP, and what it refuses."""

import re
import socket

import jax
import numpy as np
from PIL import Image
import pytest

import flextok_jax
from flextok_jax import demo
from flextok_jax.inference import programs
from flextok_jax.tools.demo import model as model_lib
from tests.support import tiny_generators
from tests.support.commands import fails


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  return tiny_generators.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(saved):
  return model_lib.Models(flextok_jax.load(saved["tokenizer"]), flextok_jax.load_ar(saved["text"]))


def picture(seed=0, size=16):
  return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def save(path, pixels):
  Image.fromarray(pixels).save(path)
  return str(path)


def test_prefixes_are_those_of_the_api_by_one_program(models):
  ids = models.encode(picture())
  np.testing.assert_array_equal(ids, models.tokenizer.tokenize(picture()[None])[0])
  models.decode([(ids, 1)], 3)
  compiled = programs.detokenize._cache_size()
  for count in range(1, 5):
    (found,) = models.decode([(ids, count)], 3)
    assert programs.detokenize._cache_size() == compiled
    wanted = models.tokenizer.detokenize(np.array([ids]), keep_k=count, key=jax.random.key(3))[0]
    assert np.abs((found / 127.5 - 1) - np.clip(wanted, -1, 1)).max() <= 1.01 / 127.5
    compiled = programs.detokenize._cache_size()
  pictures = models.prefixes(ids, 3)
  assert list(pictures) == [1, 2, 4]
  np.testing.assert_array_equal(pictures[4], found)
  assert list(models.prefixes(ids[:3], 3)) == [1, 2, 3]
  many = models.decode([(ids[:2], 4)] * 5, 3)  # more than one batch, and more tokens than there are
  np.testing.assert_array_equal(many, np.repeat(pictures[2][None], 5, 0))


def test_other_sizes(saved, tmp_path):
  tokenizer, gen = flextok_jax.load(saved["tokenizer"]), flextok_jax.load_ar(saved["class"])
  models = model_lib.Models(tokenizer, gen, (24, 40), "interpolate")
  pixels = models.read(save(tmp_path / "a.png", picture(size=64)))
  assert pixels.shape == (24, 40, 3) and {x.shape for x, _ in models.examples()} == {(24, 40, 3)}
  ids = models.encode(pixels)
  wide = flextok_jax.load(saved["tokenizer"], posemb_scaling="interpolate")
  np.testing.assert_array_equal(ids, wide.tokenize(pixels[None])[0])
  (found,) = models.decode([(ids, 2)], 3)
  wanted = wide.detokenize(np.array([ids]), keep_k=2, key=jax.random.key(3), size=(24, 40))[0]
  np.testing.assert_allclose(found / 127.5 - 1, np.clip(wanted, -1, 1), atol=1.01 / 127.5)
  steps = models.search(1, 0, "likelihood", "best of 18")
  assert steps[-1].pictures.shape[1:] == (24, 40, 3)
  with pytest.raises(ValueError, match="6 x 10 patches"):
    model_lib.Models(tokenizer, gen, (24, 40))


def test_tokens_are_parsed_and_edited(models):
  assert models.parse("[1, 2,3]") == models.parse(" 1 2\n3 ") == (1, 2, 3)
  for text, message in {
    "": "0 tokens are given: this tokenizer takes 1 to 4",
    "1 2 3 4 5": "5 tokens are given",
    "1 " * 9999: "tokens are given",
    "1 200": "token 2 is '200': ids are whole numbers, 0 to 199",
    "1 -1": "token 2 is '-1'",
    "²": "token 1 is '²'",
    "9" * 5000: "token 1 is '9",
  }.items():
    with pytest.raises(ValueError, match=message) as caught:
      models.parse(text)
    assert len(str(caught.value)) < 200
  assert model_lib.swap((1, 2, 3, 4), (5, 6, 7, 8), 1) == (1, 6, 7, 8)
  first, *changed = models.variants((1, 2, 3, 4), 2, seed=0)
  assert first == (1, 2, 3, 4) and all(ids[0] == 1 and ids[2:] == (3, 4) for ids in changed)


def test_pictures_are_read_within_bounds(models, tmp_path, monkeypatch):
  np.testing.assert_array_equal(models.read(save(tmp_path / "a.png", picture())), picture())
  monkeypatch.setattr(model_lib, "MAX_PIXELS", 255)
  with pytest.raises(ValueError, match="the picture cannot be read: 0 megapixels are more than the 0"):
    models.read(save(tmp_path / "a.png", picture()))
  for content in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\nbroken"):
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match="the picture cannot be read: ") as caught:
      models.read(str(tmp_path / "b.png"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name, condition", [("text", "red"), ("class", 2), ("none", None)])
def test_draws_and_searches_are_those_of_the_api(saved, name, condition):
  gen = flextok_jax.load_ar(saved[name])
  models = model_lib.Models(flextok_jax.load(saved["tokenizer"]), gen)
  given = {"text": dict(prompts=["red"]), "class": dict(labels=[2]), "none": {}}[name]
  assert models.condition == name and models.verifiers() == ["likelihood"]
  (wanted,) = gen.trim(gen.generate(jax.random.key(1), **given))
  drawn = list(models.draw(condition, 1))
  assert [len(ids) for ids, ended in drawn if not ended] == list(range(1, len(wanted) + 1))
  assert drawn[-1] == (tuple(wanted.tolist()), len(wanted) < 4)
  for how, settings in model_lib.SEARCHES.items() if name == "text" else ():
    keys = jax.random.fold_in(jax.random.key(1), 0)[None]
    found = gen.search(keys, models.tokenizer, "likelihood", **given, **settings)
    steps = models.search(condition, 1, "likelihood", how)
    assert steps[-1].scores[: settings["num_results"]] == found.scores[0][np.isfinite(found.scores[0])].tolist()
    assert steps[-1].ids[0] == tuple(gen.trim(found.ids[0])[0].tolist())
    best = np.round(np.clip((found.images[0, 0] + 1) * 127.5, 0, 255))
    assert np.abs(steps[-1].pictures[0] - best).max() <= 1
  assert not models.classes() or models.classes()[2] == ("class 2", 2)


def test_models_that_do_not_fit_are_refused(saved):
  with pytest.raises(ValueError, match="trained on ids of the tokenizer 0123456789abcdef"):
    model_lib.Models(flextok_jax.load(saved["tokenizer"]), flextok_jax.load_ar(saved["foreign"]))


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@pytest.fixture(scope="module")
def address(models, tmp_path_factory):
  pytest.importorskip("gradio", reason="the extra demo is not installed")
  from flextok_jax.tools.demo import server

  page, found = server.start(models, str(tmp_path_factory.mktemp("uploads")), "127.0.0.1", free_port())
  yield found.rstrip("/")
  page.close(verbose=False)


def test_the_page_over_http(address, models, tmp_path, capsys):
  from gradio_client import Client, handle_file
  from gradio_client.exceptions import AppError

  users = [Client(address, verbose=False, analytics_enabled=False) for _ in range(2)]
  for i, user in enumerate(users):
    path = save(tmp_path / f"{i}.png", picture(i))
    *_, text = user.predict(handle_file(path), 2, api_name="/open_upload")
    assert models.parse(text) == models.encode(picture(i))
  for i, user in enumerate(users):  # each has its own picture
    stage, chips = user.predict(3, api_name="/slide")
    assert "from the first 3 tokens" in stage and chips.count("ft-chip on") == 3
    assert all(f"</small>{token}</span>" in chips for token in models.encode(picture(i)))
  assert re.search(r"slider: 3 tokens in \d+ ms; median of 2: \d+ ms\n", capsys.readouterr().out)
  *_, text = users[0].predict("7, 8 9", 2, api_name="/edit")
  assert text == "7 8 9"
  assert "from the first 3 tokens" in users[0].predict(4, api_name="/slide")[0]  # of three
  with pytest.raises(AppError, match="token 1 is &#x27;&lt;b&gt;&#x27;: ids are whole numbers"):
    users[0].predict("<b>", 2, api_name="/edit")
  (tmp_path / "broken.png").write_bytes(b"broken")
  with pytest.raises(AppError, match="the picture cannot be read"):
    users[0].predict(handle_file(tmp_path / "broken.png"), 2, api_name="/open_upload")
  drawn = users[0].predict("<b>red</b>", 0, 1.0, 0.9, 2.0, api_name="/draw")
  assert "of 4 tokens" in drawn
  found = users[0].predict("red", 0, "likelihood", "best of 18", api_name="/search")
  assert found.count("<figure") == 2 + 18 and "<b>red" not in found


def test_nothing_else_is_served_or_opened(address, tmp_path):
  import httpx

  front, theme = httpx.get(f"{address}/"), httpx.get(f"{address}/theme.css")
  assert "default-src 'self'" in front.headers["content-security-policy"]
  loads = re.compile(r"""(?:src=|href=|url\(|@import\s)["']?(?:https?:)?//[^"')\s>]+""")
  assert not loads.findall(front.text) and not loads.findall(theme.text) and "body" in theme.text
  (tmp_path / "secret.txt").write_text("secret")
  for path in ("/etc/passwd", "setup.py", str(tmp_path / "secret.txt"), "../../etc/passwd"):
    assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404), path
  for route in ("file=https://example.com/x.png", "FILE=http://localhost/x", "proxy=https://x.hf.space/x"):
    assert httpx.get(f"{address}/gradio_api/{route}").status_code == 403, route
  assert httpx.get(f"{address}/config").json()["analytics_enabled"] is False
  from flextok_jax.tools.demo import server

  files = {"files": ("x.png", b"0" * (server.MAX_UPLOAD + 1))}
  assert httpx.post(f"{address}/gradio_api/upload", files=files).status_code == 413


def test_addresses_in_place_of_uploads_are_not_opened(address):
  from gradio_client import Client
  from gradio_client.exceptions import AppError

  user = Client(address, verbose=False, analytics_enabled=False)
  for path, message in (("http://127.0.0.1:9/x.png", "addresses are not opened"), ("/etc/passwd", None)):
    with pytest.raises(AppError, match=message):
      user.predict({"path": path, "meta": {"_type": "gradio.FileData"}}, 2, api_name="/open_upload")


def test_bad_flags_are_one_line(address, saved):
  fails("is a generator", demo, f"--checkpoint={saved['text']}", f"--port={free_port()}")
  port = address.rpartition(":")[2]
  fails(
    rf"port={port} of host=127.0.0.1 cannot be used \(Address already in use\): give another", demo, f"--port={port}"
  )
  fails("host=nowhere.invalid cannot be used", demo, "--host=nowhere.invalid")
