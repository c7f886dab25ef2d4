"""Stage "distill": a student of the decoder that crosses the whole path of the flow in a few evaluations.

The student is the decoder with one more input: the length of the interval that it crosses (Decoder.interval). Its
velocity is the mean of the teacher's over that interval, u(x_t, t, r) = (x_t - x_r) / (t - r), where x is a path of the
guided teacher: noise at t = 1, the decoded latents at 0. The teacher's Euler path is piecewise linear, so x at any time
is known exactly. A step of the student needs one evaluation, without an unconditional pass; its guidance, with the
momentum of APG, is that of the paths.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.config import with_fields
from flextok_jax.models.tokenizer.flextok import Sampler, sample_path
from flextok_jax.ops import flow, fsq, nested
from flextok_jax.stages.stage import Params
from flextok_jax.stages.tokenizer import TokenizerStage, bucket_rows, group, ungroup


class _Rows(flax.struct.PyTreeNode):
  """Rows of a batch with their random draws: g groups of r rows, or in a bucket one axis [b] in place of [g, r]."""

  latents: jax.Array  # [g, r, h, w, c]
  noise: jax.Array  # [g, r, h, w, c]
  keep_k: jax.Array  # int [g, r]
  segment: jax.Array  # int [g, r, n], which of its steps each row crosses, by number of steps


class DistillStage(TokenizerStage):
  """Trains the student {"decoder"}; encoder, VAE and the {"teacher"}, another decoder, are frozen.

  Raises:
    ValueError: the decoder of the config is no student's.
  """

  def __init__(self, config: ConfigDict):
    # Every row has a condition: there is no unconditional pass to train.
    super().__init__(with_fields(config, {"tokens.null_prob": 0.0, "repa.weight": 0.0}))
    if not self.model.decoder.interval:
      raise ValueError("stage 'distill' trains a student: set decoder.interval=True")
    self.teacher = self.model.clone(decoder=self.model.decoder.clone(interval=False))
    self.teacher_sampler = Sampler(**config.distill.sampler)
    self.steps = tuple(config.distill.steps)

  def init(self, key: jax.Array) -> tuple[Params, Params]:
    params, frozen = super().init(key)
    return {"decoder": params.pop("decoder")}, {**params, **frozen}

  def init_auxiliary(self, key: jax.Array) -> tuple[Params, Params]:
    """Returns ({}, {"teacher": the decoder whose paths the student learns})."""
    images = jnp.zeros((1, self.image_size, self.image_size, 3))
    return {}, {"teacher": self.teacher.init(key, images)["params"]["decoder"]}

  def initial_weights(self, weights: Mapping, params: Params) -> dict:
    """Returns the parts to start from: the teacher is the decoder of `weights`, and the student starts as the same.

    Raises:
      ValueError: the weights are a student's.
    """
    decoder = weights["decoder"]
    if "interval_embed" in decoder:
      raise ValueError("these weights are a student's: start from its teacher")
    student = {**decoder, "interval_embed": params["decoder"]["interval_embed"]}
    return {**weights, "teacher": decoder, "decoder": student}

  def latents_loss(
    self, params: Params, latents: jax.Array, key: jax.Array, teacher: jax.Array | None = None
  ) -> tuple[jax.Array, dict]:
    """Returns the loss of latents and its metrics: the squared error of the mean velocity, mean over intervals.

    Each row has one path of the teacher, and gives one interval for each number of steps of config.distill.steps: a
    random one of the steps of a sampler with that number. Rows run in buckets, as in TokenizerStage.
    """
    del teacher
    size = latents.shape[0]
    rows = self._draw(latents, key)
    outputs = []
    for first, end, length in self._buckets(rows.keep_k.shape[1]):
      bucket = jax.tree.map(lambda x, first=first, end=end: ungroup(x[:, first:end]), rows)
      output = self._student_loss(params, length, bucket)
      # [g * (end - first), n] -> [g, end - first, n]
      outputs.append(output.reshape(-1, end - first, len(self.steps)))
    # [g, r_i, n] each -> [b, n]
    losses, keep_k = ungroup(jnp.concatenate(outputs, 1)), ungroup(rows.keep_k)

    metrics = {"loss": (losses.mean(1).sum(), jnp.float32(size))}
    metrics |= {f"loss_n{n}": (losses[:, i].sum(), jnp.float32(size)) for i, n in enumerate(self.steps)}
    low = 0
    for high in nested.powers_of_two(self.tokens.num_registers):
      mask = (keep_k > low) & (keep_k <= high)
      metrics[f"loss_k{high}"] = jnp.where(mask, losses.mean(1), 0).sum(), mask.sum().astype(jnp.float32)
      low = high
    return losses.mean(), metrics

  def _draw(self, latents: jax.Array, key: jax.Array) -> _Rows:
    """Returns latents [b, h, w, c] as rows with random draws."""
    order_key, noise_key, keep_key, segment_key = jax.random.split(key, 4)
    size, n = latents.shape[0], self.tokens.num_registers
    count = bucket_rows(size, self.tokens.bucket_rows)
    latents = group(latents, count)[
      :, jax.random.permutation(order_key, jnp.arange(count, dtype=jnp.int32))
    ]  # lengths are assigned at random
    noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
    keep_k, _ = nested.sample_keep_k(keep_key, size // count, count, n, self.tokens.nested_dropout, 0.0)
    shape = (*keep_k.shape, len(self.steps))
    segment = jax.random.randint(segment_key, shape, 0, jnp.asarray(self.steps, jnp.int32), jnp.int32)
    return _Rows(latents, noise, keep_k, segment)

  def _student_loss(self, params: Params, length: int, rows: _Rows) -> jax.Array:
    """Returns the squared errors [b, n] of the rows of a bucket, computed on `length` registers."""
    apply: Callable[..., Any] = functools.partial(self.model.apply, {"params": params})
    codes = fsq.quantize(apply(rows.latents, length, method="encode_registers"), self.model.levels)
    teacher = {"decoder": params["teacher"]}
    path = sample_path(self.teacher, teacher, codes, rows.keep_k, rows.noise, self.teacher_sampler, self.fast)
    codes, path = jax.lax.stop_gradient((codes, path))

    # One interval for each number of steps: [b, n] -> [n * b].
    counts = jnp.asarray(self.steps, jnp.float32)
    start = (1 - rows.segment / counts).T.reshape(-1)
    interval = jnp.broadcast_to(1 / counts[:, None], (len(self.steps), rows.keep_k.size)).reshape(-1)
    repeat = lambda x: jnp.concatenate([x] * len(self.steps))  # [b, ...] -> [n * b, ...]
    path = jnp.concatenate([path] * len(self.steps), axis=1)
    x_t, x_r = (flow.on_path(path, t) for t in (start, start - interval))
    target = (x_t - x_r) / interval[:, None, None, None]

    drop = jnp.zeros(interval.size, bool)
    args = x_t, start, repeat(codes), repeat(rows.keep_k), drop
    velocity = apply(*args, interval=interval, method="velocity")
    error = jnp.square(velocity - target).mean((1, 2, 3))
    return error.reshape(len(self.steps), -1).T
