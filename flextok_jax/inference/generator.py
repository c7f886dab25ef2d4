"""The generator of the public interface: flextok_jax.load_ar and ARGenerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict
import numpy as np

from flextok_jax.data.text import make_tokenizer
from flextok_jax.inference import (
  conditions,
  drawing,
  priors,
  search,
  search_plan,
  sharing,
  text_encoder,
  validation,
  verifiers,
)
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.inference.validation import Array
from flextok_jax.models.ar import sampling
from flextok_jax.parallel import batching
from flextok_jax.weights import loading
from flextok_jax.weights.official import generator as official_generator

Schedule = float | Callable[[int], float]  # a number, or a function of the token's number from 0
Labels = Array | Sequence[int | str] | int | str


def load_ar(
  source: str | os.PathLike,
  dtype: str | None = None,
  *,
  mesh: Mesh | None = None,
  revision: str | None = None,
  subfolder: str = "",
  **settings: Any,
) -> ARGenerator:
  """Loads a generator of token ids.

  Args:
    source: the name of a generator that ships, such as "shapes_ar"; a workdir, folder or weights file of ours; or one
      in the released format (FlexAR): a .safetensors file, or a folder with weights and, optionally, a configuration;
      or a repository of the Hugging Face hub with a folder of either format.
    dtype: type of the parameters and of the computation, "float32" or "bfloat16"; default: that of the config, for
      released ones float32.
    mesh: devices to place the parameters on; default: the first device.
    revision: branch, tag or commit of a repository; default: its main branch.
    subfolder: of the folder or repository.
    **settings: of the released format, values that its files do not state (see weights/official/generator.py): dim,
      head_dim, depth, vocab, num_tokens, num_classes, cross, bias, norm, qk_norm, ffn, pos_embed, text_len, ...

  Raises:
    FileNotFoundError: there is no checkpoint, or it cannot be downloaded; the message says which file to put where.
    ValueError: a damaged, foreign or unsupported checkpoint, or settings that contradict it.
  """
  source = validation.path("source", source)
  where: dict[str, Any] = dict(mesh=mesh, revision=revision, subfolder=subfolder)
  if loading.is_ours(source, revision, subfolder):
    if settings:
      raise ValueError(f"{source} has its own config: no setting like {next(iter(settings))!r} can be given")
    config, params = loading.load(source, param_dtype=None, dtype=dtype, **where)
    if config.stage != "ar":
      raise ValueError(f"{source} is a model of stage {config.stage!r}, not a generator: load it by flextok_jax.load")
  else:
    config, params = official_generator.load(source, settings, dtype, **where)
  return ARGenerator(params, FrozenConfigDict(config))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True, repr=False)
class ARGenerator(sharing.SharedModel):
  """A generator of token ids: its parameters and its config.

  A pytree (the config is static). Each method is compiled once per shape of its arguments, generation once per length
  of the prefix.
  """

  params: Any
  config: FrozenConfigDict

  def __repr__(self) -> str:
    a = self.config.ar
    return f"ARGenerator({a.num_tokens} tokens of {a.num_ids:,} ids, by {a.condition}, {sharing.describe(self)})"

  @classmethod
  def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> ARGenerator:
    """Returns load_ar(source, **options)."""
    return load_ar(source, **options)

  @property
  def num_tokens(self) -> int:
    """Largest number of tokens per image."""
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
  def class_names(self) -> tuple[str, ...]:
    """Names of the classes from 0 on; () if they have none."""
    return tuple(self.config.ar.class_names)

  @property
  def stop_id(self) -> int | None:
    """The id that ends a sequence, num_ids; None for models whose sequences all have num_tokens ids."""
    return self.num_ids if self.config.ar.stop else None

  def logits(
    self,
    ids: Array,
    labels: Labels | None = None,
    text_embeddings: Array | None = None,
    text_lengths: Array | Sequence[int] | None = None,
  ) -> jax.Array:
    """Predicts each token from the ids before it (teacher forcing).

    Args:
      ids: int [b, n].
      labels: int [b], -1 for none, or class names; None: unconditional.
      text_embeddings: features [b, t, f] of a text encoder (see encode_text); None: of the empty text.
      text_lengths: int [b], number of valid positions of each text; default: t.

    Returns:
      float32 [b, n, num_ids], one more if the model has a stop id.

    Raises:
      ValueError: an argument out of range, or a condition that the model does not take.
    """
    ids = conditions.generator_ids("ids", ids, self.num_tokens, self.num_ids)
    if not ids.shape[1]:
      raise ValueError(f"ids must be integers [b, n] with n of at least 1, got shape {list(ids.shape)}")
    text = conditions.text_of(self, None, text_embeddings, text_lengths, len(ids))
    return drawing.logits(self, ids, conditions.labels_of(self, labels, len(ids)), text)

  def generate(
    self,
    key: jax.Array | None,
    labels: Labels | None = None,
    prompts: Sequence[str] | None = None,
    text_embeddings: Array | None = None,
    text_lengths: Array | Sequence[int] | None = None,
    num_tokens: int | None = None,
    prefix: Array | None = None,
    guidance_scale: Schedule | None = None,
    temperature: Schedule | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    return_log_probs: bool = False,
    null_text_embeddings: Array | None = None,
    null_text_lengths: Array | Sequence[int] | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = False,
    fast: bool = True,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Draws token ids, one after another.

    Args:
      key: one key, by which sample i draws with fold_in(key, i); or one per sample [b]. None only if greedy.
      labels: classes int [b], -1 for none, or their names (see class_names).
      prompts: texts, encoded by the model's text encoder. Without prompts and text_embeddings: the empty text.
      text_embeddings, text_lengths: text features [b, t, f] in place of prompts, and the valid positions of each.
      num_tokens: length of the result, prefix included; default: the model's num_tokens.
      prefix: int [b, p], the first tokens, of a real image, to draw the others. One row serves all samples.
      guidance_scale: logits are u + guidance_scale (c - u), u without class or with the empty text; 1: no guidance; or
        a function of the token's number from 0. Default: the checkpoint's (config.ar.guidance_scale), or 1 if no
        condition is given.
      temperature: logits are divided by it; also a function of the token's number; default: the checkpoint's.
      top_k: draw from the k most likely tokens; 0: from all; default: the checkpoint's.
      top_p: draw from the most likely tokens of this total probability; 0: from all; default: the checkpoint's.
      greedy: take the most likely token.
      return_log_probs: also return float32 [b, num_tokens], the log-probability of each token under the guided logits
        before temperature, top-k and top-p; 0 for the prefix, and after the end.
      null_text_embeddings, null_text_lengths: features [1 or b, t, f] of the empty text, for guidance; default: those
        of the model's text encoder.
      num_samples: how many; default: as many as labels, prompts, text_embeddings, prefix or keys, else 1.
      batch_size: draw this many at a time; default: all at once. The samples are the same.
      progress: show a progress bar; None: a bar on a terminal, and lines elsewhere.
      fast: False for the slow reference implementation, which recomputes everything at every step.

    Returns:
      int32 [b, num_tokens]. A model with a stop id returns it from the end of a sequence on (see trim).

    Raises:
      ValueError: an argument out of range, or a condition that the model does not take.
    """
    if batch_size is not None or validation.progress(progress) is not False:
      given = dict(labels=labels, prompts=prompts, text_embeddings=text_embeddings, text_lengths=text_lengths)
      given |= dict(prefix=prefix, null_text_embeddings=null_text_embeddings, null_text_lengths=null_text_lengths)
      same: dict[str, Any] = dict(num_tokens=num_tokens, guidance_scale=guidance_scale, temperature=temperature)
      same |= dict(top_k=top_k, top_p=top_p, greedy=greedy, return_log_probs=return_log_probs, fast=fast)
      return self._generate_in_batches(key, given, same, num_samples, batch_size, progress)
    num_tokens = self.num_tokens if num_tokens is None else num_tokens
    num_tokens = validation.whole_number("num_tokens", num_tokens, 1, self.num_tokens)
    fast, return_log_probs = validation.flag("fast", fast), validation.flag("return_log_probs", return_log_probs)
    conditioned = any(x is not None for x in (labels, prompts, text_embeddings))
    sampler = self.token_sampler(conditioned, guidance_scale, temperature, top_k, top_p, greedy)
    sizes: dict[str, int | None] = {}
    if num_samples is not None:
      sizes["num_samples"] = validation.at_least_one("num_samples", num_samples)
    if prefix is not None:
      prefix = conditions.generator_ids("prefix", prefix, self.num_tokens, self.num_ids)
      sizes["prefix"] = len(prefix) if len(prefix) > 1 else None
    nulls = null_text_embeddings, null_text_lengths
    keys, *condition = conditions.inputs(
      self, key, labels, prompts, text_embeddings, text_lengths, nulls, sampler, sizes
    )
    prefix = conditions.prefix(prefix, len(keys), num_tokens)
    length = sampling.padded_length(num_tokens, self.num_tokens)
    args = keys, *condition, prefix, np.int32(num_tokens), sampler
    ids, log_probs = drawing.generate(self, *args, length=length, fast=fast)
    ids, log_probs = ids[:, :num_tokens], log_probs[:, :num_tokens]
    return (ids, log_probs) if return_log_probs else ids

  def _generate_in_batches(
    self,
    key: Any,
    given: Mapping[str, Any],
    same: Mapping[str, Any],
    num_samples: int | None,
    batch_size: int | None,
    progress: bool | None,
  ) -> Any:
    """Returns generate(**given, **same), computed in batches of one size.

    Args:
      key, num_samples, batch_size, progress: of generate.
      given: arguments that may have a value for each sample.
      same: the others.
    """
    several = lambda x: not isinstance(x, str) and np.ndim(x) > 0 and len(x) > 1
    key = None if key is None else validation.typed_keys(key)
    sizes: dict[str, int | None] = {name: len(x) if several(x) else None for name, x in given.items() if x is not None}
    sizes |= {"num_samples": num_samples, "key": len(key) if key is not None and key.ndim else None}
    count = validation.num_samples(sizes)
    keys = None if key is None else validation.keys(key, count)

    def draw(rows: np.ndarray) -> Any:
      take = lambda x: [x[i] for i in rows] if isinstance(x, Sequence) else x[rows]
      part: dict[str, Any] = {name: take(x) if x is not None and several(x) else x for name, x in given.items()}
      return self.generate(None if keys is None else keys[rows], **part, **same, num_samples=len(rows))

    return batching.apply_in_batches(
      draw, np.arange(count), validation.batch_size(batch_size), "samples drawn", progress
    )

  def stream(
    self,
    key: jax.Array | None,
    labels: Labels | None = None,
    prompts: Sequence[str] | None = None,
    num_tokens: int | None = None,
    guidance_scale: Schedule | None = None,
    temperature: Schedule | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
  ) -> Iterator[np.ndarray]:
    """Draws token ids as generate does, from the same keys the same ids, and yields them after each token.

    Args:
      key, labels, prompts, num_tokens, guidance_scale, temperature, top_k, top_p, greedy: as for generate.

    Yields:
      int32 [b, 1], [b, 2], ... up to num_tokens, or until all sequences have ended.

    Raises:
      ValueError: an argument out of range, or a condition that the model does not take.
    """
    num_tokens = self.num_tokens if num_tokens is None else num_tokens
    num_tokens = validation.whole_number("num_tokens", num_tokens, 1, self.num_tokens)
    conditioned = labels is not None or prompts is not None
    sampler = self.token_sampler(conditioned, guidance_scale, temperature, top_k, top_p, greedy)
    keys, classes, text, null_text = conditions.inputs(
      self, key, labels, prompts, None, None, (None, None), sampler, {}
    )
    prior = priors.GeneratorPrior(
      drawing.network(self.config), self.params, np.asarray(classes), text, null_text, sampler
    )
    rows = prior.start(np.arange(len(keys)), sampling.padded_length(num_tokens, self.num_tokens), None)
    for i in range(num_tokens):
      rows = prior.extend(rows, keys, i, i + 1, greedy)
      yield np.asarray(rows.sequences.ids)[:, : i + 1]
      if np.asarray(rows.sequences.done).all():
        return

  def search(
    self,
    key: jax.Array | None,
    tokenizer: FlexTok | None = None,
    verifier: Any = "likelihood",
    labels: Labels | None = None,
    prompts: Sequence[str] | None = None,
    text_embeddings: Array | None = None,
    text_lengths: Array | Sequence[int] | None = None,
    guidance_scale: Schedule | None = None,
    temperature: Schedule | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    null_text_embeddings: Array | None = None,
    null_text_lengths: Array | Sequence[int] | None = None,
    verifier_prompts: Sequence[str] | None = None,
    weights: str | None = None,
    references: Array | None = None,
    ensemble: str = "rank",
    progress: bool | None = False,
    size: tuple[int, int] | None = None,
    **settings: Any,
  ) -> search.Result:
    """Searches for the token ids, of each class or prompt, whose pictures a verifier scores best.

    Args:
      key: one key, by which sample i draws with fold_in(key, i); or one per sample. None only if greedy and without a
        tokenizer.
      tokenizer: decodes candidates, by its own sampler, for a verifier that looks at images, and the results.
      verifier: a name of verifiers.NAMES, a function of search.Candidates, or several for an ensemble: verifiers.make.
      labels, prompts, text_embeddings, text_lengths, null_text_embeddings, null_text_lengths: as for generate.
      guidance_scale, temperature, top_k, top_p: as for generate.
      verifier_prompts: texts for the verifier in place of the prompts, for instance of a generator without text.
      weights, references, ensemble: of the verifier, see verifiers.make.
      progress: show a progress bar; None: a bar on a terminal, and lines elsewhere.
      size: (height, width) of the pictures; default: the tokenizer's image_size. References must have it.
      **settings: of search_plan.Settings: algorithm, beam_width, candidates, schedule, steps, lookahead, branching,
        greedy, num_results, ...

    Returns:
      search.Result.

    Raises:
      ValueError: an argument out of range, a condition that the model does not take, or a verifier lacks something.
    """
    chosen = search_plan.make_settings(settings)
    check = verifiers.make(verifier, weights=weights, references=references, ensemble=ensemble)
    conditioned = any(x is not None for x in (labels, prompts, text_embeddings))
    sampler = self.token_sampler(conditioned, guidance_scale, temperature, top_k, top_p, chosen.greedy)
    if key is None and tokenizer is not None:
      raise ValueError("decoding starts from noise: pass key=jax.random.key(seed)")
    if tokenizer is not None:
      self.check_tokenizer(tokenizer)
    told = {"verifier_prompts": verifier_prompts, "references": references}
    sizes = {name: len(value) for name, value in told.items() if value is not None}
    nulls = null_text_embeddings, null_text_lengths
    keys, rows, text, null_text = conditions.inputs(
      self, key, labels, prompts, text_embeddings, text_lengths, nulls, sampler, sizes
    )
    prior = priors.GeneratorPrior(drawing.network(self.config), self.params, np.asarray(rows), text, null_text, sampler)
    texts = verifier_prompts if verifier_prompts is not None else prompts
    classes = None if labels is None else np.asarray(rows)
    return search.search(prior, keys, check, tokenizer, texts, classes, chosen, progress, size)

  def check_tokenizer(self, tokenizer: FlexTok, name: str = "the tokenizer") -> None:
    """Raises ValueError, calling the tokenizer `name`, unless it is the one whose ids this generator draws."""
    codes, registers = tokenizer.num_codes, tokenizer.num_registers
    if self.num_ids != codes or self.num_tokens > registers:
      raise ValueError(
        f"the generator draws up to {self.num_tokens} tokens of {self.num_ids} ids, {name} takes"
        f" {registers} of {codes}: give the tokenizer whose ids it was trained on"
      )
    trained = self.config.ar.tokenizer
    if trained and trained != (given := tokenizer.fingerprint):
      raise ValueError(
        f"the generator was trained on ids of the tokenizer {trained}, but {name} is {given}: "
        "give the tokenizer whose ids it was trained on"
      )

  def trim(self, ids: Array) -> list[np.ndarray]:
    """Cuts sequences [b, n] where they ended: a list of int32 arrays, as FlexTok.detokenize takes them."""
    rows = conditions.generator_ids("ids", ids, self.num_tokens, self.num_ids + 1)
    if validation.is_traced(rows):
      raise ValueError("sequences of different lengths cannot leave jax.jit: call trim outside")
    ended = np.cumsum(rows == self.num_ids, 1) > 0
    return [row[: int((~end).sum())] for row, end in zip(rows, ended)]

  def encode_text(self, prompts: Sequence[str]) -> tuple[jax.Array, np.ndarray]:
    """Encodes texts; the features of the empty text mean no condition.

    A T5 is loaded from config.text.path when it is first needed.

    Returns:
      (features [b, t, f], lengths int32 [b]: the valid positions of each).

    Raises:
      FileNotFoundError, ValueError: a model without text, no list of texts, or no encoder at config.text.path.
    """
    settings = self.config.text
    if self.config.ar.condition != "text":
      raise ValueError(f"this model's condition is {self.config.ar.condition!r}: it takes no prompts")
    ids, lengths = _tokenizer(settings)(conditions.texts(prompts))
    if settings.encoder == "bytes":
      return drawing.encode_text_ids(self, ids, lengths), lengths
    return text_encoder.load_t5_once(settings.path, self.config.dtype, settings.features)(ids, lengths), lengths

  def token_sampler(
    self,
    conditioned: bool,
    guidance_scale: Schedule | None = None,
    temperature: Schedule | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
  ) -> sampling.TokenSampler:
    """Returns how tokens are drawn, as for generate: as the checkpoint's config says where an argument is None.

    Raises:
      ValueError: an argument out of range.
    """
    own = self.config.ar
    if guidance_scale is None:
      guidance_scale = own.guidance_scale if conditioned else 1.0
    temperature = own.temperature if temperature is None else temperature
    top_k = own.top_k if top_k is None else top_k
    top_p = own.top_p if top_p is None else top_p
    sampler = conditions.token_sampler(guidance_scale, temperature, top_k, top_p, greedy, self.num_ids, self.num_tokens)
    if sampler.guidance_scale is not None and own.condition == "none":
      raise ValueError(f"guidance_scale={guidance_scale} needs a condition, and this model has none: leave it at 1")
    return sampler


@functools.lru_cache(maxsize=4)
def _tokenizer(text: FrozenConfigDict) -> Any:
  return make_tokenizer(text.encoder, text.max_length, text.path)
