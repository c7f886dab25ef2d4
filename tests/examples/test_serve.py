"""The example server on loopback: load, limits, bad requests; its answers are those of the models' own methods."""

import asyncio
import contextlib
import dataclasses
import io
import socket
import threading

from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np
from PIL import Image
import pytest

import flextok_jax
from flextok_jax.config import with_fields
from tests.support import tiny_generators

for package in ("fastapi", "httpx", "python_multipart", "uvicorn"):
  pytest.importorskip(package, reason="pip install 'flextok-jax[serve]'")

import httpx  # noqa: E402
import uvicorn  # noqa: E402

from examples import serve  # noqa: E402

MAX_REQUESTS, MAX_BYTES, SIZES = 60, 100_000, (1, 4, 16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns a tokenizer of 16 px images, 4 tokens and 200 codes, and generators by caption and by class."""
  paths = tiny_generators.save(tmp_path_factory.mktemp("models"))
  gens = {name: flextok_jax.load_ar(paths[name]) for name in ("text", "class", "foreign")}
  return {"tokenizer": flextok_jax.load(paths["tokenizer"]), **gens}


@contextlib.contextmanager
def running(app):
  """Serves an application on a free port of loopback; returns its address."""
  server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    started = threading.Event()
    startup = server.startup

    async def announce(sockets=None):
      await startup(sockets)
      started.set()

    server.startup = announce
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert started.wait(300) and server.started
    try:
      yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
      server.should_exit = True
      thread.join(60)


@pytest.fixture(scope="module")
def app(models):
  return serve.make_app(models["tokenizer"], models["text"], SIZES, 5, MAX_REQUESTS, MAX_BYTES)


@pytest.fixture(scope="module")
def address(app):
  with running(app) as found:
    yield found


def send(address, *requests):
  """Sends requests (path, arguments of httpx) at once; returns the answers in the same order."""

  async def everything():
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=120, limits=limits) as client:
      return await asyncio.gather(*(client.post(path, **arguments) for path, arguments in requests))

  return asyncio.run(everything())


def png(image):
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return file.getvalue()


def upload(data, name="picture.png"):
  return {"files": {"file": (name, data)}}


def read(answer):
  assert answer.status_code == 200, answer.text
  assert answer.headers["content-type"] == "image/png"
  return np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)


def to_8bit(images):
  return np.round(np.clip((np.asarray(images) + 1) * 127.5, 0, 255)).astype(int)


@contextlib.contextmanager
def held(batcher):
  """Holds the batches of a batcher until the body ends."""
  gate, run = threading.Event(), batcher._run
  batcher._run = lambda jobs: gate.wait(120) and run(jobs)
  try:
    yield gate
  finally:
    gate.set()
    batcher._run = run


def test_fifty_requests_at_once(models, app, address):
  """None is lost, they share batches, and each has the answer that it would have alone."""
  rng, model = np.random.default_rng(0), models["tokenizer"]
  pictures = rng.integers(0, 256, (50, 16, 16, 3), np.uint8)
  before = len(app.state.batchers["tokenize"].batches)
  answers = send(address, *(("/tokenize", upload(png(picture))) for picture in pictures))
  assert [answer.status_code for answer in answers] == [200] * 50
  ids = np.array([answer.json()["ids"] for answer in answers])
  np.testing.assert_array_equal(ids, model.tokenize(pictures))
  batches = app.state.batchers["tokenize"].batches[before:]
  assert sum(batches) == 50 and max(batches) <= SIZES[-1]

  counts, seeds = rng.integers(1, 5, 50), rng.integers(0, 2**32, 50)
  jobs = [
    {"ids": row, "keep_k": int(count), "seed": int(seed)} for row, count, seed in zip(ids.tolist(), counts, seeds)
  ]
  answers = send(address, *(("/detokenize", {"json": job}) for job in jobs))
  expected = model.detokenize(ids, counts, serve.row_keys(seeds))
  np.testing.assert_allclose([read(answer) for answer in answers], to_8bit(expected), atol=1)


def test_waiting_requests_share_batches(app, address):
  """While one is computed, 20 more arrive: they are one full batch and the rest."""
  batcher = app.state.batchers["detokenize"]
  before, requests = len(batcher.batches), [("/detokenize", {"json": {"ids": [i]}}) for i in range(21)]

  async def all_sent():
    client = httpx.AsyncClient(base_url=address, trust_env=False, timeout=120)
    async with asyncio.timeout(120), client:
      sent = [asyncio.create_task(client.post(path, **arguments)) for path, arguments in requests]
      while sum(batcher.batches[before:]) + batcher._queue.qsize() < len(requests):
        await asyncio.sleep(0.01)
      gate.set()
      return await asyncio.gather(*sent)

  with held(batcher) as gate:
    answers = asyncio.run(all_sent())
  assert [answer.status_code for answer in answers] == [200] * 21
  first, *others = batcher.batches[before:]
  assert sum(others) == 21 - first and len(others) == -(-(21 - first) // SIZES[-1])


def test_requests_beyond_the_limit_are_refused_and_the_others_answered(app, address):
  batcher = app.state.batchers["tokenize"]
  picture = upload(png(np.zeros((16, 16, 3), np.uint8)))

  async def too_many():
    limits = httpx.Limits(max_connections=None)
    client = httpx.AsyncClient(base_url=address, trust_env=False, timeout=120, limits=limits)
    async with asyncio.timeout(120), client:
      waiting = [asyncio.create_task(client.post("/tokenize", **picture)) for _ in range(MAX_REQUESTS + 7)]
      while sum(task.done() for task in waiting) < 7:  # the refused ones end while the others wait
        await asyncio.sleep(0.01)
      refused = [task.result() for task in waiting if task.done()]
      health = await client.get("/health")
      gate.set()
      return refused, health, await asyncio.gather(*waiting)

  with held(batcher) as gate:
    refused, health, answers = asyncio.run(too_many())
  assert [answer.status_code for answer in refused] == [503] * 7
  assert refused[0].headers["retry-after"] == "1" and "too many requests" in refused[0].json()["detail"]
  assert health.status_code == 200 and health.json()["num_tokens"] == 4
  assert sorted(answer.status_code for answer in answers) == [200] * MAX_REQUESTS + [503] * 7
  assert send(address, ("/tokenize", picture))[0].status_code == 200


def test_generate_by_caption(models, address):
  """Draws the tokens and the picture that the models draw for the seed, however long the sequence is."""
  gen, tokenizer = models["text"], models["tokenizer"]
  wishes = [{"prompt": "a red star", "seed": seed} for seed in range(4)] + [{"prompt": "zwei Äpfel", "seed": 3}]
  lengths = set()
  for wish, answer in zip(wishes, send(address, *(("/generate", {"json": wish}) for wish in wishes))):
    (ids,) = gen.trim(gen.generate(wish["seed"], prompts=[wish["prompt"]]))
    assert answer.headers["x-token-ids"] == ",".join(map(str, ids))
    np.testing.assert_allclose(read(answer), to_8bit(tokenizer.detokenize([ids], key=wish["seed"]))[0], atol=1)
    lengths.add(len(ids))
  assert len(lengths) > 1


def test_bad_requests(address):
  bomb = io.BytesIO()
  Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
  cases = [
    (422, "cannot be read", "/tokenize", upload(b"no picture")),
    (422, "cannot be read", "/tokenize", upload(png(np.zeros((16, 16, 3), np.uint8))[:45])),
    (422, "megapixels", "/tokenize", upload(bomb.getvalue())),
    (422, "file is empty", "/tokenize", upload(b"")),
    (422, "Field required", "/tokenize", {}),
    (422, "less than or equal to 4", "/tokenize?num_tokens=5", upload(b"")),
    (413, f"more than {MAX_BYTES} bytes", "/tokenize", upload(bytes(MAX_BYTES + 1))),
    (413, f"more than {serve.MAX_JSON} bytes", "/detokenize", {"json": {"ids": [0] * 40_000}}),
    (422, "5 ids: give 1 to 4", "/detokenize", {"json": {"ids": [0] * 5}}),
    (422, "0 ids: give 1 to 4", "/detokenize", {"json": {"ids": []}}),
    (422, "ids are 0 to 199", "/detokenize", {"json": {"ids": [0, 200]}}),
    (422, "ids are 0 to 199", "/detokenize", {"json": {"ids": [10**30]}}),
    (422, "keep_k=3 must be", "/detokenize", {"json": {"ids": [1, 2], "keep_k": 3}}),
    (422, "less than 4294967296", "/detokenize", {"json": {"ids": [1], "seed": 2**32}}),
    (422, "JSON", "/detokenize", {"content": b"{", "headers": {"content-type": "application/json"}}),
    (422, "needs prompt", "/generate", {"json": {}}),
    (422, "takes no label", "/generate", {"json": {"label": 1}}),
    (422, "the prompt is empty", "/generate", {"json": {"prompt": " "}}),
    (422, "at most 1000 characters", "/generate", {"json": {"prompt": "a" * 1001}}),
  ]
  answers = send(address, *(case[2:] for case in cases))
  for (status, message, *_), answer in zip(cases, answers):
    assert (answer.status_code, message in answer.text) == (status, True), (message, answer.status_code, answer.text)
  # They have taken no place for good.
  assert send(address, ("/detokenize", {"json": {"ids": [1]}}))[0].status_code == 200


def test_other_generators(models):
  named = with_fields(ConfigDict(models["class"].config), {"ar.class_names": ("disc", "ring", "star", "heart", "moon")})
  gen = dataclasses.replace(models["class"], config=FrozenConfigDict(named))
  with running(serve.make_app(models["tokenizer"], gen, (1, 4))) as address:
    wishes = [{"label": label, "seed": 9} for label in (4, "moon", "disc", 5, "sun")]
    *fine, beyond, unknown = send(address, *(("/generate", {"json": wish}) for wish in wishes))
  for answer, label in zip(fine, (4, 4, 0), strict=True):
    ids = gen.generate(9, labels=[label])[0]
    assert answer.headers["x-token-ids"] == ",".join(map(str, ids)) and read(answer).shape == (16, 16, 3)
  assert beyond.status_code == 422 and "label=5 must be one of 0 to 4, disc, ring" in beyond.text
  assert unknown.status_code == 422 and "label='sun' must be" in unknown.text
  with running(serve.make_app(models["tokenizer"], sizes=(1,))) as address:
    (answer,) = send(address, ("/generate", {"json": {}}))
  assert answer.status_code == 404 and "no generator" in answer.text
  with pytest.raises(ValueError, match="was trained on ids of the tokenizer 0123456789abcdef"):
    serve.make_app(models["tokenizer"], models["foreign"])
  with pytest.raises(ValueError, match="at least 1, got 0"):
    serve.make_app(models["tokenizer"], sizes=(0, 4))


def test_a_model_that_is_missing_is_one_line(monkeypatch):
  monkeypatch.setattr("sys.argv", ["serve.py", "--tokenizer=/absent"])
  with pytest.raises(SystemExit, match="^error: no such checkpoint: /absent[^\n]*$"):
    serve.main()


def test_a_batch_that_fails_leaves_the_server_running(app, address):
  batcher = app.state.batchers["detokenize"]
  run, batcher._run = batcher._run, lambda jobs: 1 / 0
  (answer,) = send(address, ("/detokenize", {"json": {"ids": [1]}}))
  assert answer.status_code == 500
  batcher._run = run
  assert send(address, ("/detokenize", {"json": {"ids": [1]}}))[0].status_code == 200
