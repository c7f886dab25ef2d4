"""What samples of a generator are drawn by: keys, classes, texts and how tokens are chosen; checks of these arguments.

As in validation.py, every check raises a ValueError that names the argument, its value and what it must be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.config.ranges import SCALES, TEMPERATURES
from flextok_jax.core.errors import quote
from flextok_jax.inference import validation
from flextok_jax.inference.validation import Array
from flextok_jax.models.ar.sampling import TokenSampler

if TYPE_CHECKING:
  from flextok_jax.inference.generator import ARGenerator

Text = tuple[Array, Array]  # features [b, t, f] and lengths int32 [b]


def inputs(
  gen: ARGenerator,
  key: jax.Array | None,
  labels: Any,
  prompts: Sequence[str] | None,
  text_embeddings: Any,
  text_lengths: Any,
  nulls: tuple[Any, Any],
  sampler: TokenSampler,
  sizes: Mapping[str, int | None],
) -> tuple[jax.Array, Array, Text | None, Text | None]:
  """Returns what samples are drawn by: keys [b], labels [b], text, and the unconditional half's text under guidance.

  Args:
    gen: the generator.
    nulls: features and lengths of the empty text, or (None, None).
    sampler: how they are drawn.
    sizes: {name: number of samples that another argument asks for, None: any number}.
    key: see ARGenerator.generate, as for labels, prompts, text_embeddings and text_lengths.
  """
  sizes = dict(sizes)
  if labels is not None:
    labels = validation.array("labels", class_numbers(labels, gen.class_names))
    sizes["labels"] = len(labels) if labels.ndim else None
  if prompts is not None:
    prompts = texts(prompts, allow_empty=False)
    sizes["prompts"] = len(prompts)
  if text_embeddings is not None:
    text_embeddings = validation.floats("text_embeddings", text_embeddings)
    sizes["text_embeddings"] = len(text_embeddings) if text_embeddings.ndim else None
  if key is not None:
    key = validation.typed_keys(key)
    sizes["key"] = len(key) if key.ndim else None
  elif not sampler.greedy:
    raise ValueError("tokens are drawn at random: pass key=jax.random.key(seed), or greedy=True")
  batch = validation.num_samples(sizes)
  keys = validation.keys(jax.random.key(0) if key is None else key, batch)
  text, null_text = text_of(gen, prompts, text_embeddings, text_lengths, batch), None
  if text is not None and sampler.guidance_scale is not None:
    null_features, null_lengths = gen.encode_text([""]) if nulls[0] is None else nulls
    null_text = null_text_features(null_features, null_lengths, batch, gen.config.text.features)
  return keys, labels_of(gen, labels, batch), text, null_text


def labels_of(gen: ARGenerator, labels: Any, batch: int) -> Array:
  """Returns the class of each sample int32 [b]; ValueError for classes that the model does not take."""
  if labels is not None and not gen.num_classes:
    raise ValueError(f"this model's condition is {gen.config.ar.condition!r}: it takes no labels")
  return classes(class_numbers(labels, gen.class_names), batch, gen.num_classes)


def text_of(gen: ARGenerator, prompts: Sequence[str] | None, features: Any, lengths: Any, batch: int) -> Text | None:
  """Returns the text of each sample, by default the empty text; None for models without."""
  if prompts is not None:
    if features is not None:
      raise ValueError("prompts and text_embeddings are both given: give one of them")
    features, lengths = gen.encode_text(prompts)
  if gen.config.ar.condition != "text":
    if features is not None:
      raise ValueError(f"this model's condition is {gen.config.ar.condition!r}: it takes no text")
    return None
  if features is None:
    features, lengths = gen.encode_text([""])
    features, lengths = jnp.repeat(features, batch, 0), np.repeat(lengths, batch)
  return text_features(features, lengths, batch, gen.config.text.features)


def generator_ids(name: str, ids: Any, num_tokens: int, num_ids: int) -> Array:
  """Returns ids [b, n] as int32."""
  ids = validation.array(name, ids)
  if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape[1] > num_tokens:
    raise ValueError(
      f"{name} must be integers [b, n] with n of at most {num_tokens}, got {ids.dtype} {list(ids.shape)}"
    )
  validation.ids_in_range(f" in {name}", ids, num_ids)
  return ids.astype(np.int32)


def prefix(ids: Array | None, batch: int, num_tokens: int) -> Array:
  """Returns the first tokens of samples as int32 [b, p], p < num_tokens; None: p = 0. One row serves all samples."""
  if ids is None:
    return np.zeros((batch, 0), np.int32)
  if ids.shape[1] >= num_tokens:
    raise ValueError(f"a prefix of {ids.shape[1]} tokens leaves nothing to draw of num_tokens={num_tokens}")
  return validation.namespace(ids).broadcast_to(ids, (batch, ids.shape[1]))


def class_numbers(classes: Any, names: Sequence[str]) -> Any:
  """Returns one class or several with a number in place of each name."""
  if isinstance(classes, np.ndarray) and classes.dtype.kind == "U":
    classes = classes.tolist()
  if isinstance(classes, str):
    if classes not in names:
      known = f"its classes are {quote(', '.join(names))}" if names else "it has no names of classes: give numbers"
      raise ValueError(f"this model has no class named {quote(classes)}: {known}")
    return list(names).index(classes)
  if isinstance(classes, Sequence) and any(isinstance(x, str) for x in classes):
    return [class_numbers(x, names) for x in classes]
  return classes


def classes(labels: Any, batch: int, num_classes: int) -> Array:
  """Returns classes as int32 [b]; None: -1, no class."""
  if labels is None:
    return np.full(batch, -1, np.int32)
  labels = validation.array("labels", labels)
  if labels.shape not in ((), (batch,)) or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be whole numbers, one for each of {batch} samples, got {quote(labels)}")
  if not validation.is_traced(labels) and not -1 <= labels.min() <= labels.max() < num_classes:
    worst = labels.min() if labels.min() < -1 else labels.max()
    raise ValueError(f"class {worst} is out of range: classes are 0 to {num_classes - 1}, -1 for none")
  return validation.namespace(labels).broadcast_to(labels.astype(np.int32), (batch,))


def texts(prompts: Any, allow_empty: bool = True) -> list[str]:
  """Returns a list of texts."""
  listed = isinstance(prompts, Sequence | np.ndarray) and not isinstance(prompts, str)
  if not listed or not all(isinstance(text, str) for text in prompts):
    raise ValueError(f"prompts must be a list of texts, got {quote(prompts)}")
  for i, text in enumerate(prompts):
    if not allow_empty and not text.strip():
      raise ValueError(f"prompt {i} is empty: say what to draw, or leave prompts out to draw without condition")
    if any("\ud800" <= character <= "\udfff" for character in text):
      raise ValueError(f"prompt {i} is no valid text, it holds half of a surrogate pair: {quote(text)}")
  return [str(text) for text in prompts]


def text_features(features: Any, lengths: Any, batch: int, width: int) -> tuple[Array, Array]:
  """Returns (text features [b, t, f], int32 [b]: how many of the t positions count, by default all)."""
  features = validation.floats("text_embeddings", features)
  if features.ndim != 3 or features.shape[0] != batch or not features.shape[1] or features.shape[2] != width:
    raise ValueError(f"text_embeddings must have shape [{batch}, t, {width}], got {list(features.shape)}")
  size = features.shape[1]
  lengths = np.full(batch, size, np.int32) if lengths is None else validation.array("text_lengths", lengths)
  if not validation.is_traced(lengths):
    whole = np.issubdtype(lengths.dtype, np.integer) and lengths.shape == (batch,)
    if not whole or not 1 <= lengths.min() <= lengths.max() <= size:
      raise ValueError(f"text_lengths must be {batch} whole numbers from 1 to {size}, got {quote(lengths)}")
  return jnp.asarray(features), lengths.astype(np.int32)


def null_text_features(features: Any, lengths: Any, batch: int, width: int) -> tuple[Array, Array]:
  """As text_features, of the empty text: one for all samples, or one per sample."""
  features = validation.floats("null_text_embeddings", features)
  if features.ndim != 3 or features.shape[0] not in (1, batch):
    raise ValueError(f"null_text_embeddings must have shape [1 or {batch}, t, {width}], got {list(features.shape)}")
  return text_features(features, lengths, features.shape[0], width)


def token_sampler(
  guidance_scale: Any, temperature: Any, top_k: Any, top_p: Any, greedy: Any, num_ids: int, num_tokens: int
) -> TokenSampler:
  """Returns how tokens are drawn; guidance_scale and temperature may be functions of the token's number from 0."""
  real: Any = np.float32

  def scheduled(name: str, value: Any, low: float, high: float, remedy: str = "") -> Any:
    if not callable(value):
      return real(validation.number(name, value, low, high, remedy))
    return np.array(
      [validation.number(f"{name}({i})", value(i), low, high, remedy) for i in range(num_tokens)], np.float32
    )

  scale = scheduled("guidance_scale", guidance_scale, *SCALES)
  divisor = scheduled("temperature", temperature, *TEMPERATURES, "; greedy=True takes the most likely token")
  mass = validation.number("top_p", top_p, 0, 1, ", 0 for off")
  return TokenSampler(
    guidance_scale=None if np.all(scale == 1) else scale,
    temperature=divisor,
    top_p=real(mass) if mass else None,
    top_k=validation.whole_number("top_k", top_k, 0, num_ids),
    greedy=validation.flag("greedy", greedy),
  )
