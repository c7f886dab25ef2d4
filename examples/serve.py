"""An HTTP server that answers requests in batches, an example to start from.

pip install 'flextok-jax[serve]'
python examples/serve.py [--tokenizer=shapes_student] [--generator=shapes_ar_stop] [--port=8000]

curl -F file=@photo.jpg http://127.0.0.1:8000/tokenize                        {"ids": [713, 224, ...]}
curl --json '{"ids": [713, 224], "seed": 1}' -o picture.png http://127.0.0.1:8000/detokenize
curl --json '{"prompt": "a red ring"}' -o picture.png http://127.0.0.1:8000/generate

Requests that arrive within a few milliseconds share a batch, padded to one of a few sizes, whose programs are compiled
before the first request. A picture depends on its request alone: it is the one that the model's own methods return for
the same seed. Memory is bounded: beyond --max_requests at once the answer is 503, to a picture of more than --max_bytes
it is 413.
"""

import argparse
import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import io
import os
import sys
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Response, UploadFile
from fastapi.responses import JSONResponse
import jax
import numpy as np
from pydantic import BaseModel, Field
import uvicorn

import flextok_jax
from flextok_jax.data import transforms

MAX_MEGAPIXELS = "40"  # of an uploaded picture
MAX_CAPTION = 1000  # characters
MAX_JSON = 2**16  # bytes of a body without a picture
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Tokens(BaseModel):
  """Token ids to decode, from the first keep_k of them."""

  ids: list[int]
  keep_k: int | None = None
  seed: Seed = 0


class Wish(BaseModel):
  """What to draw: a caption or a class, by number or name, as the generator takes it, or neither."""

  prompt: Annotated[str | None, Field(max_length=MAX_CAPTION)] = None
  label: int | str | None = None
  seed: Seed = 0


class Batcher:
  """Runs jobs that arrive within a few milliseconds as one batch.

  Attributes:
    batches: the number of jobs in each batch so far, of the last hundred.
  """

  def __init__(self, run: Callable[[list], Sequence], worker: ThreadPoolExecutor, sizes: Sequence[int], wait_ms: float):
    self._run, self._worker, self._sizes, self._wait = run, worker, sorted(sizes), wait_ms / 1000
    self._queue: asyncio.Queue = asyncio.Queue()  # as long as Limits allows
    self.batches: list[int] = []

  async def __call__(self, job: Any) -> Any:
    """Returns the result of a job."""
    done = asyncio.get_running_loop().create_future()
    self._queue.put_nowait((job, done))
    return await done

  async def work(self):
    """Runs batches forever."""
    most = self._sizes[-1]
    while True:
      waiting = [await self._queue.get()]
      if self._queue.qsize() < most - 1:
        await asyncio.sleep(self._wait)
      while len(waiting) < most and not self._queue.empty():
        waiting.append(self._queue.get_nowait())
      waiting = [(job, done) for job, done in waiting if not done.done()]  # clients may have gone
      if waiting:
        await self._run_batch(*zip(*waiting))

  async def _run_batch(self, jobs: Sequence[Any], futures: Sequence[asyncio.Future]):
    size = next(size for size in self._sizes if size >= len(jobs))
    padded = [*jobs, *[jobs[-1]] * (size - len(jobs))]
    self.batches = [*self.batches[-99:], len(jobs)]
    try:
      results = await asyncio.get_running_loop().run_in_executor(self._worker, self._run, padded)
    except Exception as error:
      for done in futures:
        if not done.done():
          done.set_exception(error)
      return
    for done, result in zip(futures, results):
      if not done.done():
        done.set_result(result)


class Limits:
  """Refuses requests beyond `max_requests` at once, and bodies beyond `max_bytes`, before they take memory."""

  def __init__(self, app: Any, max_requests: int, max_bytes: int):
    self._app, self._max_requests, self._max_bytes, self._running = app, max_requests, max_bytes, 0

  async def __call__(self, scope: dict, receive: Callable, send: Callable):
    if scope["type"] != "http" or scope["path"] == "/health":
      await self._app(scope, receive, send)
      return
    if self._running >= self._max_requests:
      busy = JSONResponse({"detail": "too many requests at once: try again"}, 503, {"Retry-After": "1"})
      await busy(scope, receive, send)
      return
    received, most = 0, self._max_bytes if scope["path"] == "/tokenize" else MAX_JSON

    async def receive_some() -> dict:
      nonlocal received
      message = await receive()
      received += len(message.get("body", b""))
      if received > most:
        raise HTTPException(413, f"the body has more than {most} bytes")
      return message

    self._running += 1
    try:
      await self._app(scope, receive_some, send)
    finally:
      self._running -= 1


def make_app(
  tokenizer: flextok_jax.FlexTok,
  generator: flextok_jax.ARGenerator | None = None,
  sizes: Sequence[int] = (1, 4, 16),
  wait_ms: float = 5,
  max_requests: int = 64,
  max_bytes: int = 10_000_000,
) -> FastAPI:
  """Returns the application.

  Args:
    tokenizer: encodes and decodes.
    generator: of its token ids; None: /generate answers 404.
    sizes: of batches.
    wait_ms: milliseconds that the first job of a batch waits for others.
    max_requests: at once.
    max_bytes: of a picture's request.

  Raises:
    ValueError: a model without tokens, a generator of another tokenizer's ids, or sizes below 1.
  """
  if min(sizes) < 1:
    raise ValueError(f"sizes of batches must be at least 1, got {min(sizes)}")
  if generator is not None:
    generator.check_tokenizer(tokenizer)
  longest, num_codes, size = tokenizer.num_registers, tokenizer.num_codes, tokenizer.image_size
  condition = generator.config.ar.condition if generator is not None else "none"

  # What runs in the only thread that computes: lists of jobs -> their results.

  def tokenize(images: list[np.ndarray]) -> np.ndarray:
    return np.asarray(tokenizer.tokenize(np.stack(images)))

  def detokenize(jobs: list[tuple[list[int], int, int]]) -> list:
    ids, counts, seeds = zip(*jobs)
    rows = np.stack([np.pad(row[:count], (0, longest - count)) for row, count in zip(ids, counts)]).astype(np.int32)
    return flextok_jax.to_pil(tokenizer.detokenize(rows, np.array(counts, np.int32), row_keys(seeds)))

  def generate(jobs: list[tuple[Any, int]]) -> list[np.ndarray]:
    conditions, seeds = zip(*jobs)
    given = {"class": {"labels": np.array(conditions)}, "text": {"prompts": conditions}}.get(condition, {})
    return generator.trim(generator.generate(row_keys(seeds), **given))

  worker, codecs = ThreadPoolExecutor(1), ThreadPoolExecutor(2)
  batchers = {
    run.__name__: Batcher(run, worker, sizes, wait_ms)
    for run in (tokenize, detokenize, generate)
    if run is not generate or generator is not None
  }

  def compile_all():
    plain = {"class": -1, "text": "a"}.get(condition)
    for size_of_batch in sizes:
      tokenize([np.zeros((size, size, 3), np.uint8)] * size_of_batch)
      for count in {longest, *(1 << i for i in range(longest.bit_length()))}:  # others share their programs
        detokenize([([0] * count, count, 0)] * size_of_batch)
      if generator is not None:
        generate([(plain, 0)] * size_of_batch)

  @contextlib.asynccontextmanager
  async def lifespan(app: FastAPI):
    await in_thread(worker, compile_all)
    tasks = [asyncio.create_task(batcher.work()) for batcher in batchers.values()]
    yield
    for task in tasks:
      task.cancel()

  app = FastAPI(title="flextok_jax", lifespan=lifespan, docs_url=None, redoc_url=None)  # pages with outside scripts
  app.add_middleware(Limits, max_requests=max_requests, max_bytes=max_bytes)
  app.state.batchers = batchers

  @app.get("/health")
  def health() -> dict:
    return {"tokenizer": repr(tokenizer), "generator": repr(generator), "num_tokens": longest, "num_codes": num_codes}

  @app.post("/tokenize")
  async def post_tokenize(file: UploadFile, num_tokens: Annotated[int, Query(ge=1, le=longest)] = longest) -> dict:
    data = await file.read()
    try:
      image = await in_thread(codecs, transforms.center_crop, io.BytesIO(data), size)
    except ValueError as error:
      raise HTTPException(422, f"the picture cannot be read: {error}") from None
    ids = await batchers["tokenize"](image)
    return {"ids": ids[:num_tokens].tolist()}

  @app.post("/detokenize")
  async def post_detokenize(tokens: Tokens) -> Response:
    ids, keep_k = tokens.ids, len(tokens.ids) if tokens.keep_k is None else tokens.keep_k
    check(1 <= len(ids) <= longest, f"{len(ids)} ids: give 1 to {longest}")
    check(min(ids) >= 0 and max(ids) < num_codes, f"ids are 0 to {num_codes - 1}")
    check(1 <= keep_k <= len(ids), f"keep_k={keep_k} must be from 1 to the {len(ids)} ids")
    return await picture(ids, keep_k, tokens.seed)

  @app.post("/generate")
  async def post_generate(wish: Wish) -> Response:
    check(generator is not None, "this server has no generator", 404)
    takes = {"class": "label", "text": "prompt"}.get(condition)
    for name in ("label", "prompt"):
      needed = "needs" if name == takes else "takes no"
      check((getattr(wish, name) is not None) == (name == takes), f"this generator {needed} {name}")
    asked: Any = wish.prompt
    if takes == "label":
      classes, names = range(generator.num_classes), generator.class_names
      known = ", ".join([f"{classes[0]} to {classes[-1]}", *names])
      check(wish.label in classes or wish.label in names, f"label={wish.label!r} must be one of {known}")
      asked = names.index(wish.label) if wish.label in names else wish.label
    check(takes != "prompt" or is_text(asked), "the prompt is empty or no valid text")
    ids = await batchers["generate"]((asked, wish.seed))
    return await picture(ids.tolist(), len(ids), wish.seed)

  async def picture(ids: list[int], keep_k: int, seed: int) -> Response:
    image = await batchers["detokenize"]((ids, keep_k, seed))
    png = await in_thread(codecs, to_png, image)
    return Response(png, media_type="image/png", headers={"X-Token-Ids": ",".join(map(str, ids[:keep_k]))})

  return app


def row_keys(seeds: Sequence[int]) -> jax.Array:
  """Returns the key by which the models draw the first sample of each seed."""
  return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(np.array(seeds, np.uint32))


def to_png(image: Any) -> bytes:
  """Returns a Pillow image as the bytes of a PNG file."""
  file = io.BytesIO()
  image.save(file, "PNG")
  return file.getvalue()


def check(fine: bool, message: str, status: int = 422):
  """Answers with an error unless the request is fine."""
  if not fine:
    raise HTTPException(status, message)


def is_text(prompt: str) -> bool:
  """Whether a prompt says something, in characters that UTF-8 has."""
  return bool(prompt.strip()) and not any("\ud800" <= character <= "\udfff" for character in prompt)


async def in_thread(pool: ThreadPoolExecutor, function: Callable, *args: Any) -> Any:
  """Runs a function in a pool of threads."""
  return await asyncio.get_running_loop().run_in_executor(pool, function, *args)


def main():
  """Loads the models and serves them."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--tokenizer", default="shapes_student", help="name, file, folder or hub repository")
  parser.add_argument("--generator", default="shapes_ar_stop", help="of its token ids; '' for none")
  parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 answers other machines")
  parser.add_argument("--port", type=int, default=8000)
  parser.add_argument("--sizes", default="1,4,16", help="of batches")
  parser.add_argument("--wait_ms", type=float, default=5, help="that the first request of a batch waits for others")
  parser.add_argument("--max_requests", type=int, default=64, help="at once")
  parser.add_argument("--max_bytes", type=int, default=10_000_000, help="of a picture's request")
  args = parser.parse_args()
  os.environ.setdefault("FLEXTOK_MAX_MEGAPIXELS", MAX_MEGAPIXELS)
  try:
    tokenizer = flextok_jax.load(args.tokenizer)
    generator = flextok_jax.load_ar(args.generator) if args.generator else None
    sizes = [int(size) for size in args.sizes.split(",")]
    app = make_app(tokenizer, generator, sizes, args.wait_ms, args.max_requests, args.max_bytes)
  except (OSError, ValueError) as error:
    sys.exit(f"error: {error}")
  uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
  main()
