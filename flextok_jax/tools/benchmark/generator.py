"""The benchmark's jobs for generators: "ar", which draws tokens with guidance, and "train"."""

from collections.abc import Callable, Sequence
import dataclasses
import functools

from flax.core.meta import unbox
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.core import timing
from flextok_jax.models.ar import sampling as ar_sampling
from flextok_jax.ops import attention
from flextok_jax.tools.benchmark import jobs

_NUM_TOKENS = 5  # index among the arguments of "ar"


class GeneratorBenchmark(jobs.TokenizerBenchmark):
  """A generator with random parameters; see jobs.TokenizerBenchmark.

  "ar" samples with the guidance, temperature, top-k and top-p of config.ar; an image is one sequence. Texts have full
  length. A jointly trained text encoder is included; a T5 is not: its features are random.
  """

  def __init__(self, config: ConfigDict, paths: tuple[str, ...], batch_size: int, latents: bool):
    super().__init__(config, paths, batch_size, latents)
    self.latents = True  # there is no VAE
    self.guided = config.ar.condition != "none" and config.ar.guidance_scale != 1
    self.has_text = config.ar.condition == "text"

  def run(self, job: str, num_tokens: int | None, repeats: int, limit: float) -> list[jobs.Row]:
    """Measures a job as the base class does; rows of "ar" also have token_bytes."""
    rows = super().run(job, num_tokens, repeats, limit)
    if num_tokens is None:
      return rows
    read = self.token_bytes(num_tokens)
    return [dataclasses.replace(row, token_bytes=read) if row.path == "fast" else row for row in rows]

  def _time(self, job, num_tokens, runs, args, repeats, limit):
    if job == "train":
      return super()._time(job, num_tokens, runs, args, repeats, limit)

    def fewer(path: str, count: int, *args) -> tuple:  # the count is an argument of the program: nothing is recompiled
      return runs[path](*args[:_NUM_TOKENS], jnp.int32(count), *args[_NUM_TOKENS + 1 :])

    counts = sorted({1, *(i * num_tokens // 4 for i in range(1, 4))} - {0, num_tokens}) if "fast" in runs else ()
    shorter = {count: functools.partial(fewer, "fast", count) for count in counts}
    # One token warms up: all 256 of the plain path take minutes on a CPU.
    warm_up = {path: functools.partial(fewer, path, 1) for path in runs}
    return timing.time_rounds({**runs, **shorter}, args, repeats, limit, warm_up=warm_up)

  def _while_trips(self, path: str, num_tokens: int | None) -> Sequence[int]:
    """Returns the trip counts of the loops over tokens, if no sample stops early: on the plain path one per length."""
    if num_tokens is None:
      return ()
    if path == "fast":
      return (num_tokens,)
    chunk, total = ar_sampling.SLOW_CHUNK, ar_sampling.padded_length(num_tokens, self.config.ar.num_tokens)
    return [max(0, min(chunk, num_tokens - start)) for start in range(0, total, chunk)]

  def token_bytes(self, num_tokens: int) -> int:
    """Returns the bytes that a step of the fast path reads at least: matrices of blocks and readout, and the caches.

    Caches are of all slots and of the text's tokens. Left out are norms, vectors, matrices that multiply only the text
    and what is written (one position).
    """
    c, rows = self.config.ar, self.batch_size * (1 + self.guided)
    named = flatten_dict(unbox(jax.eval_shape(self._stage("fast").init, self._key(0)))[0]["ar"])
    matrices = sum(x.size for path, x in named.items() if path[-1] == "kernel" and "kv" not in path)
    text = self.config.text.max_length if self.has_text else 0
    caches = 2 * c.depth * rows * (ar_sampling.padded_length(num_tokens, c.num_tokens) + text) * c.width
    return (matrices + caches) * jnp.dtype(self.config.dtype).itemsize

  def _dtype(self, job: str) -> str:
    return self.config.dtype

  def _has_paths(self, job: str) -> bool:
    return job == "ar"

  @property
  def _parts(self) -> tuple[str, ...]:
    joint = self.has_text and self.config.text.encoder == "bytes"
    return ("ar", *(("text_mlp",) if self.has_text else ()), *(("text",) if joint else ()))

  def _random(self, purpose: int, bound: int, *shape: int) -> jax.Array:
    return jax.random.randint(self._key(purpose), shape, 0, bound, jnp.int32)

  def _text(self, count: int) -> dict[str, jax.Array]:
    """Returns texts of full length as in a training batch, {} if the generator reads no text."""
    if not self.has_text:
      return {}
    c = self.config.text
    lengths = jnp.full(count, c.max_length, jnp.int32)
    if c.encoder == "bytes":
      return {"text_ids": self._random(10, 256, count, c.max_length), "text_lengths": lengths}
    features = jax.random.normal(self._key(10), (count, c.max_length, c.features), self.config.dtype)
    return {"text_features": features, "text_lengths": lengths}

  def _labels(self) -> jax.Array:
    """int32 [b], -1 for models without classes."""
    if self.config.ar.condition != "class":
      return jnp.full(self.batch_size, -1, jnp.int32)
    return self._random(11, self.config.ar.num_classes, self.batch_size)

  def _ar(self, num_tokens: int):
    c, size, guided = self.config.ar, self.batch_size, self.guided
    text = self._text(size + guided)  # the last one stands for the empty text

    def make(stage, fast: bool) -> Callable:
      length = ar_sampling.padded_length(num_tokens, self.config.ar.num_tokens)

      def fn(params, keys, labels, text, prefix, num_tokens, sampler):
        features = lengths = None
        if text:
          features, lengths = text.get("text_features"), text["text_lengths"]
          if features is None:
            args = text["text_ids"], lengths
            features = stage.model.apply({"params": params}, *args, method="encode_text")
          if guided:
            features, lengths = (
              jnp.concatenate([x[:-1], jnp.broadcast_to(x[-1:], (size, *x.shape[1:]))]) for x in (features, lengths)
            )
        args = keys, labels, features, lengths, prefix, num_tokens, sampler
        return ar_sampling.generate(stage.model, params, *args, length=length, fast=fast)

      return fn

    labels = self._labels()
    labels = jnp.concatenate([labels, jnp.full(size, -1, jnp.int32)]) if guided else labels
    prefix = jnp.zeros((size, 0), jnp.int32)
    sampler = ar_sampling.TokenSampler(
      guidance_scale=jnp.float32(c.guidance_scale) if guided else None,
      temperature=jnp.float32(c.temperature),
      top_p=jnp.float32(c.top_p) if c.top_p else None,
      top_k=c.top_k,
    )
    inputs = jax.random.split(self._key(12), size), labels, text, prefix, jnp.int32(num_tokens), sampler
    return (self._params(*self._parts), *inputs), make

  def _train(self):
    optimizer, c = self._optimizer(), self.config.ar
    make = lambda stage, _: self._update(stage, optimizer)
    inputs = {
      "token_ids": self._random(13, c.num_ids, self.batch_size, c.num_tokens),
      "length": jnp.full(self.batch_size, c.num_tokens, jnp.int32),
      "label": self._labels(),
      **self._text(self.batch_size),
    }
    return self._update_args(optimizer, self._parts, (), inputs), make

  def attention_of(self, job: str, path: str) -> str:
    """Returns the implementation of attention to tokens and text; attention to cached keys is two products of XLA."""
    if path == "fast":
      return "xla"
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    masked = (True, False) if self.has_text else (True,)
    return "+".join(
      dict.fromkeys(attention.choose_implementation(c.attention, c.ar.head_dim, dtype, masked=m) for m in masked)
    )
