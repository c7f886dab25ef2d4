"""The generator to call: flextok_jax.load_ar(...) and the ARGenerator that it returns."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict
import numpy as np

from flextok_jax.models.ar import sampling as ar_sampling
from flextok_jax.stages.ar import make_generator
from flextok_jax.weights import loading, saving
from flextok_jax.weights.official import generator as official_generator

Array = jax.Array | np.ndarray


def load_ar(
  source: str | os.PathLike, dtype: str | None = None, *, mesh: Mesh | None = None, **settings
) -> ARGenerator:
  """Loads a generator of token ids.

  Args:
    source: a workdir, folder or weights file of ours; or one in the released format (FlexAR): a .safetensors file, a
      folder or a repository of the Hugging Face hub with weights and perhaps a configuration.
    dtype: type in which it computes and keeps its parameters, "float32" or "bfloat16"; default: that of the config, for
      released ones float32.
    mesh: devices to place the parameters on; default: the first device.
    **settings: of the released format, what its files do not say (see weights/official/generator.py): dim, head_dim,
      depth, vocab, num_tokens, num_classes, cross, bias, norm, qk_norm, ffn, pos_embed, text_len, ...

  Raises:
    FileNotFoundError: nothing there, or it cannot be downloaded; the message says what to put where.
    ValueError: a damaged, foreign or unsupported checkpoint, or settings that contradict it.
  """
  source = os.fspath(source)
  if os.path.exists(source) and loading.is_ours(source):
    if settings:
      raise ValueError(f"{source} says itself what it is: no setting like {next(iter(settings))!r} can be given")
    config, params = loading.load(source, param_dtype=None, dtype=dtype, mesh=mesh)
    if config.stage != "ar":
      raise ValueError(f"{source} is a model of stage {config.stage!r}, not a generator: load it by flextok_jax.load")
  else:
    config, params = official_generator.load(source, settings, dtype, mesh)
  return ARGenerator(params, FrozenConfigDict(config))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class ARGenerator:
  """A generator: parameters and the config that says what they are.

  A pytree (the config is static). Each method is compiled once per shape of its arguments, generation once per length
  of the prefix; bad arguments raise a ValueError that names them.
  """

  params: Any
  config: FrozenConfigDict

  @property
  def num_tokens(self) -> int:
    """Tokens an image at most."""
    return self.config.ar.num_tokens

  @property
  def num_ids(self) -> int:
    """Size of the vocabulary: token ids are 0 to num_ids - 1."""
    return self.config.ar.num_ids

  @property
  def num_classes(self) -> int:
    """Classes 0 to num_classes - 1; 0 for models without."""
    return self.config.ar.num_classes if self.config.ar.condition == "class" else 0

  @property
  def stop_id(self) -> int | None:
    """What stands where a sequence has ended, num_ids; None for models that do not stop by themselves."""
    return self.num_ids if self.config.ar.stop else None

  def logits(self, ids: Array, labels=None, text_embeddings: Array | None = None, text_lengths=None) -> jax.Array:
    """Teacher forcing: what the model expects at each place, given the ids before it.

    Args:
      ids: int [b, n].
      labels: int [b], -1 for none; None: unconditional.
      text_embeddings: features [b, t, f] of a text encoder (see encode_text); None: of the empty text.
      text_lengths: int [b], how many of them count; default: t.

    Returns:
      float32 [b, n, num_ids], one more where the model has a stop id.
    """
    ids = self._ids("ids", ids)
    if not ids.shape[1]:
      raise ValueError(f"ids must be integers [b, n] with n of at least 1, got shape {list(ids.shape)}")
    batch = len(ids)
    labels = self._labels(labels, batch)
    text_embeddings, text_lengths = self._text(text_embeddings, text_lengths, batch)
    return _logits(self, ids, labels, text_embeddings, text_lengths)

  def generate(
    self,
    key: jax.Array | None,
    labels=None,
    prompts: Sequence[str] | None = None,
    text_embeddings: Array | None = None,
    text_lengths=None,
    num_tokens: int | None = None,
    prefix: Array | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    greedy: bool = False,
    return_log_probs: bool = False,
    null_text_embeddings: Array | None = None,
    null_text_lengths=None,
    batch_size: int | None = None,
    fast: bool = True,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Draws token ids, one after another.

    Args:
      key: of the draw; or one a sample [b]. With one key, sample i draws by fold_in(key, i). None only if greedy.
      labels: classes int [b], -1 for none.
      prompts: texts, encoded by the model's text encoder. Without prompts and text_embeddings: the empty text.
      text_embeddings, text_lengths: text features [b, t, f] in place of prompts, and how many of each count.
      num_tokens: length of the outcome, with the prefix; default: all the model has.
      prefix: int [b, p], the first tokens: of a real image, to redraw the rest. One row serves all samples.
      guidance_scale: logits are u + guidance_scale (c - u), u without class or with the empty text.
      temperature: logits are divided by it.
      top_k: the k likeliest alone are drawn; 0: off.
      top_p: the likeliest alone, as many as make up this share; 0: off.
      greedy: the likeliest always.
      return_log_probs: also float32 [b, num_tokens], of each token under the guided logits before temperature, top-k
        and top-p; 0 for the prefix, and after the end.
      null_text_embeddings, null_text_lengths: features [1 or b, t, f] of the empty text, for guidance; default: those
        that the model's text encoder gives.
      batch_size: samples; default: as many as labels, prompts, text_embeddings, prefix or keys say, else 1.
      fast: False recomputes everything at every step: the same, slowly.

    Returns:
      int32 [b, num_tokens]. A model that stops by itself gives stop_id from the end of a sequence on (see trim).
    """
    num_tokens = self.num_tokens if num_tokens is None else num_tokens
    if not isinstance(num_tokens, int | np.integer) or not 1 <= num_tokens <= self.num_tokens:
      raise ValueError(f"num_tokens={num_tokens!r} must be a whole number from 1 to the model's {self.num_tokens}")
    self._check_choices(guidance_scale, temperature, top_k, top_p)
    key = _typed(key)
    batch = self._batch(key, labels, prompts, text_embeddings, prefix, batch_size)
    guided = guidance_scale != 1
    labels = self._labels(labels, batch)
    if guided:
      if self.config.ar.condition == "none":
        raise ValueError(f"guidance_scale={guidance_scale} needs a condition, and this model has none: leave it at 1")
      labels = _numpy(labels).concatenate([labels, np.full(batch, -1, np.int32)])
    if prompts is not None:
      text_embeddings, text_lengths = self._encode_prompts(prompts, text_embeddings)
    text, lengths = self._text(text_embeddings, text_lengths, batch)
    if guided and text is not None:
      if null_text_embeddings is None:
        null_text_embeddings, null_text_lengths = self.encode_text([""])
      text, lengths = self._with_null(text, lengths, null_text_embeddings, null_text_lengths)

    prefix = self._prefix(prefix, batch, num_tokens)
    if key is None and not greedy:
      raise ValueError("generate draws at random: pass key=jax.random.key(seed), or greedy=True")
    if key is None:
      key = jax.random.key(0)
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    sampler = ar_sampling.TokenSampler(
      guidance_scale=np.float32(guidance_scale) if guided else None,
      temperature=np.float32(temperature),
      top_p=np.float32(top_p) if top_p else None,
      top_k=int(top_k),
      greedy=greedy,
    )
    length = ar_sampling.padded_length(num_tokens, self.num_tokens)
    condition = labels, text, lengths
    ids, log_probs = _generate(self, keys, *condition, prefix, np.int32(num_tokens), sampler, length=length, fast=fast)
    ids, log_probs = ids[:, :num_tokens], log_probs[:, :num_tokens]
    return (ids, log_probs) if return_log_probs else ids

  def trim(self, ids: Array) -> list[np.ndarray]:
    """Cuts sequences [b, n] where they ended: a list of int32 arrays, as FlexTok.detokenize takes them."""
    rows = np.asarray(ids, np.int32)
    return [row[: int((row < self.num_ids).sum())] for row in rows]

  def encode_text(self, prompts: Sequence[str]) -> tuple[jax.Array, np.ndarray]:
    """Texts -> features [b, t, f] and lengths int32 [b]; those of the empty text mean no condition.

    A T5 is loaded from config.text.path when it is first needed.
    """
    config = self.config
    if config.ar.condition != "text":
      raise ValueError(f"this model's condition is {config.ar.condition!r}: it takes no prompts")
    _check_texts(prompts)
    ids, lengths = _tokenizer(config.text)(list(prompts))
    if config.text.encoder == "bytes":
      return _encode_text(self, ids, lengths), lengths
    return _t5(config.text.path, config.dtype)(ids, lengths), lengths

  def save(self, folder: str | os.PathLike):
    """Writes a folder that load_ar reads: weights.safetensors (each array in its type) and config.json."""
    saving.save_folder(folder, self.config, self.params)

  def _check_choices(self, guidance_scale, temperature, top_k, top_p):
    if not math.isfinite(guidance_scale):
      raise ValueError(f"guidance_scale={guidance_scale!r} must be a finite number")
    if not 0 < temperature < math.inf:
      raise ValueError(f"temperature={temperature!r} must be above 0; greedy=True takes the likeliest")
    if not isinstance(top_k, int | np.integer) or not 0 <= top_k <= self.num_ids:
      raise ValueError(f"top_k={top_k!r} must be a whole number from 0 (off) to {self.num_ids}")
    if not 0 <= top_p <= 1:
      raise ValueError(f"top_p={top_p!r} must lie in (0, 1], or be 0 for off")

  def _batch(self, key, labels, prompts, text_embeddings, prefix, batch_size) -> int:
    """Returns the number of samples that the arguments agree on."""
    sizes = {"batch_size": batch_size}
    named = dict(labels=labels, prompts=prompts, text_embeddings=text_embeddings)
    sizes |= {name: np.shape(value)[0] for name, value in named.items() if np.ndim(value)}
    if prefix is not None and np.ndim(prefix) == 2 and len(prefix) > 1:
      sizes["prefix"] = len(prefix)
    if key is not None and key.ndim:
      sizes["key"] = len(key)
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if len(set(sizes.values())) > 1:
      raise ValueError(f"how many samples? {', '.join(f'{name} says {size}' for name, size in sizes.items())}")
    batch = next(iter(sizes.values()), 1)
    if batch < 1:
      raise ValueError(f"{next(iter(sizes))} is empty: at least one sample is needed")
    return batch

  def _ids(self, name: str, ids: Array) -> np.ndarray | jax.Array:
    """Checks ids [b, n] and returns them as int32."""
    if not isinstance(ids, jax.core.Tracer):
      ids = np.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape[1] > self.num_tokens:
      raise ValueError(
        f"{name} must be integers [b, n] with n of at most {self.num_tokens}, got {ids.dtype} {list(ids.shape)}"
      )
    if not isinstance(ids, jax.core.Tracer) and ids.size and not 0 <= ids.min() <= ids.max() < self.num_ids:
      worst = ids.min() if ids.min() < 0 else ids.max()
      raise ValueError(f"token id {worst} in {name} is out of range: ids are 0 to {self.num_ids - 1}")
    return ids.astype(np.int32)

  def _prefix(self, prefix: Array | None, batch: int, num_tokens: int) -> np.ndarray | jax.Array:
    if prefix is None:
      return np.zeros((batch, 0), np.int32)
    prefix = self._ids("prefix", prefix)
    if prefix.shape[1] >= num_tokens:
      raise ValueError(f"a prefix of {prefix.shape[1]} tokens leaves nothing to draw of num_tokens={num_tokens}")
    return _numpy(prefix).broadcast_to(prefix, (batch, prefix.shape[1]))

  def _labels(self, labels, batch: int) -> np.ndarray | jax.Array:
    if labels is None:
      return np.full(batch, -1, np.int32)
    if not self.num_classes:
      raise ValueError(f"this model's condition is {self.config.ar.condition!r}: it takes no labels")
    traced = isinstance(labels, jax.core.Tracer)
    labels = labels if traced else np.asarray(labels)
    if labels.shape not in ((), (batch,)) or not jnp.issubdtype(labels.dtype, jnp.integer):
      raise ValueError(f"labels must be whole numbers, one for each of {batch} samples, got {labels!r}")
    if not traced and not -1 <= labels.min() <= labels.max() < self.num_classes:
      worst = labels.min() if labels.min() < -1 else labels.max()
      raise ValueError(f"class {worst} is out of range: classes are 0 to {self.num_classes - 1}, -1 for none")
    return _numpy(labels).broadcast_to(labels.astype(np.int32), (batch,))

  def _encode_prompts(self, prompts: Sequence[str], text_embeddings) -> tuple:
    if text_embeddings is not None:
      raise ValueError("prompts and text_embeddings are both given: give one of them")
    _check_texts(prompts)
    for i, prompt in enumerate(prompts):
      if not prompt.strip():
        raise ValueError(f"prompt {i} is empty: say what to draw, or leave prompts out to draw without condition")
    return self.encode_text(prompts)

  def _text(self, features, lengths, batch: int) -> tuple:
    """Checks text features [b, t, f] and their lengths; None: the empty text."""
    if self.config.ar.condition != "text":
      if features is not None:
        raise ValueError(f"this model's condition is {self.config.ar.condition!r}: it takes no text")
      return None, None
    if features is None:
      features, lengths = self.encode_text([""])
      features, lengths = jnp.repeat(features, batch, 0), np.repeat(lengths, batch)
    features = features if isinstance(features, jax.core.Tracer) else jnp.asarray(features)
    width = self.config.text.features
    if np.ndim(features) != 3 or features.shape[0] != batch or not features.shape[1] or features.shape[2] != width:
      raise ValueError(f"text_embeddings must have shape [{batch}, t, {width}], got {list(np.shape(features))}")
    size = features.shape[1]
    lengths = np.full(batch, size, np.int32) if lengths is None else lengths
    if not isinstance(lengths, jax.core.Tracer):
      lengths = np.asarray(lengths)
      whole = np.issubdtype(lengths.dtype, np.integer) and lengths.shape == (batch,)
      if not whole or not 1 <= lengths.min() <= lengths.max() <= size:
        raise ValueError(f"text_lengths must be {batch} whole numbers from 1 to {size}, got {lengths!r}")
    return features, lengths.astype(np.int32)

  def _with_null(self, text, lengths, null_text, null_lengths) -> tuple:
    """Appends the text of the unconditional half, padded to the same length."""
    batch = len(lengths)
    null_text = jnp.asarray(null_text)
    if null_text.ndim != 3 or null_text.shape[0] not in (1, batch):
      raise ValueError(
        f"null_text_embeddings must have shape [1 or {batch}, t, {text.shape[2]}], got {list(null_text.shape)}"
      )
    null_text, null_lengths = self._text(null_text, null_lengths, len(null_text))
    null_text = jnp.broadcast_to(null_text, (batch, *null_text.shape[1:]))
    null_lengths = np.broadcast_to(null_lengths, (batch,))
    size = max(text.shape[1], null_text.shape[1])
    both = [jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0))) for x in (jnp.asarray(text), null_text)]
    return jnp.concatenate(both), jnp.concatenate([lengths, null_lengths])


def _numpy(x):
  """The numpy that x is of: under jit jax's."""
  return jnp if isinstance(x, jax.core.Tracer) else np


def _typed(key):
  """Returns a key, or one a sample, in jax's new style; ValueError for anything else."""
  if key is None:
    return None
  dtype, ndim = getattr(key, "dtype", None), np.ndim(key)
  if dtype == np.uint32 and np.shape(key)[-1:] == (2,):
    key, ndim = jax.random.wrap_key_data(key), ndim - 1
  elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise ValueError(f"key must be a key like jax.random.key(seed), got {key!r}")
  if ndim > 1:
    raise ValueError(f"key must be one key or one a sample [b], got keys of shape {list(key.shape)}")
  return key


def _check_texts(prompts):
  if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
    raise ValueError(f"prompts must be a list of texts, got {prompts!r}")


@functools.lru_cache(maxsize=32)
def _network(config: FrozenConfigDict):
  return make_generator(config)


@functools.lru_cache(maxsize=4)
def _tokenizer(text: FrozenConfigDict):
  from flextok_jax.data.text import make_tokenizer  # late: few models take text

  return make_tokenizer(text.encoder, text.max_length, text.path)


@functools.lru_cache(maxsize=1)
def _t5(path: str, dtype: str):
  """Returns the T5 encoder at path as a function of text ids [b, t] and lengths [b]."""
  from flextok_jax.models.perception.t5 import T5Encoder
  from flextok_jax.weights.perception.t5 import load_t5  # late: few models take text

  sizes, params = load_t5(path, dtype)
  encoder = T5Encoder(**sizes, dtype=jnp.dtype(dtype))
  encode = jax.jit(lambda params, ids, lengths: encoder.apply({"params": params}, ids, lengths))
  return functools.partial(encode, params)


def _precision(config: FrozenConfigDict) -> str | None:
  # float32 means float32: accelerators would multiply in fewer bits by default, and a token may flip.
  return "highest" if config.dtype == "float32" else None


@jax.jit
def _encode_text(gen: ARGenerator, text_ids, text_lengths) -> jax.Array:
  with jax.default_matmul_precision(_precision(gen.config)):
    return _network(gen.config).apply({"params": gen.params}, text_ids, text_lengths, method="encode_text")


@jax.jit
def _logits(gen: ARGenerator, ids, labels, text_embeddings, text_lengths) -> jax.Array:
  with jax.default_matmul_precision(_precision(gen.config)):
    return _network(gen.config).apply({"params": gen.params}, ids, labels, text_embeddings, text_lengths)


@functools.partial(jax.jit, static_argnames=("length", "fast"))
def _generate(gen: ARGenerator, *args: Any, length: int, fast: bool) -> tuple[jax.Array, jax.Array]:
  with jax.default_matmul_precision(_precision(gen.config)):
    return ar_sampling.generate(_network(gen.config), gen.params, *args, length=length, fast=fast)
