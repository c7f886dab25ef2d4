"""Stage "distill": a student of the decoder that crosses the whole path of the flow in a few evaluations.

The student is the decoder with one more input: the length of the interval that it crosses (Decoder.interval). Its
velocity is the mean over that interval, u(y, t, r) = (y - x_r) / (t - r), where x is a path of the guided teacher
(noise at t = 1, the decoded latents at 0) and y is where the student's own sampler is at t, from the same noise. The
teacher's Euler path is piecewise linear, so x at any time is known exactly. A step of the student needs one evaluation,
without an unconditional pass; its guidance, with the momentum of APG, is that of the paths.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.config import with_fields
from flextok_jax.models.tokenizer.decoder import Inputs
from flextok_jax.models.tokenizer.flextok import Sampler, sample_path
from flextok_jax.ops import flow, fsq, nested
from flextok_jax.stages.stage import Params
from flextok_jax.stages.tokenizer import TokenizerStage, bucket_of, bucket_rows, cut_modulations, group, ungroup


def student_config(config: ConfigDict, steps: Sequence[int]) -> ConfigDict:
  """Returns the config of a student of the tokenizer of a config, for some numbers of steps.

  Raises:
    ValueError: the config is not of stage "tokenizer", or `steps` is out of range.
  """
  if config.stage != "tokenizer":
    raise ValueError(f"a model of stage {config.stage!r} is not a teacher: give a tokenizer")
  fields = {f"distill.sampler.{name}": value for name, value in config.sampler.items()}
  fields |= {"stage": "distill", "decoder.interval": True, "distill.steps": tuple(steps)}
  fields |= {"sampler.guidance": "none", "sampler.num_steps": max(steps)}
  return with_fields(config, fields)


class Noised(flax.struct.PyTreeNode):
  """Rows of images with the noise that their paths start from: g groups of r rows, or in a bucket one axis [b]."""

  latents: jax.Array  # [g, r, h, w, c]
  noise: jax.Array  # [g, r, h, w, c]
  keep_k: jax.Array  # int [g, r]


class Paths(flax.struct.PyTreeNode):
  """Rows of paths of the teacher: g groups of r rows, or in a bucket one axis [b]."""

  codes: jax.Array  # [g, r, n, code_dim], quantised
  keep_k: jax.Array  # int [g, r]
  path: jax.Array  # [g, r, m + 1, h, w, c], states at the times 1, 1 - 1 / m, ..., 0


def intervals_of(segment: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the times at which the steps `segment`, from 0, of samplers of `steps` steps begin, and their lengths."""
  t = 1 - segment / steps
  return t, jnp.broadcast_to(1 / steps, t.shape)


class DistillStage(TokenizerStage):
  """Trains the student {"decoder"}; encoder, VAE and the {"teacher"}, another decoder, are frozen.

  Raises:
    ValueError: the decoder of the config is not that of a student.
  """

  parts = ("decoder",)
  block_parts = ()  # a student has new parameters outside of its blocks

  def __init__(self, config: ConfigDict):
    # Every row has a condition: there is no unconditional pass to train.
    super().__init__(with_fields(config, {"tokens.null_prob": 0.0, "repa.weight": 0.0}))
    if not self.model.decoder.interval:
      raise ValueError("stage 'distill' trains a student: set decoder.interval=True")
    if self.model.base_side:
      raise ValueError("a student has steps of equal length: set flow.base_size=0, and use a teacher trained with it")
    self.teacher = self.model.clone(decoder=self.model.decoder.clone(interval=False))
    self.teacher_sampler = Sampler(**config.distill.sampler)
    self.steps = tuple(config.distill.steps)
    self.runs = len(self.steps)
    self.intervals = math.lcm(*self.steps)  # of a path

  def init_model(self, key: jax.Array) -> tuple[Params, Params]:
    params, frozen = super().init_model(key)
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
    copied = jax.tree.map(jnp.copy, decoder)  # updates overwrite the student's arrays
    student = {**copied, "interval_embed": params["decoder"]["interval_embed"]}
    return {**weights, "teacher": decoder, "decoder": student}

  def loss_fn(self, params: Params, batch: Mapping, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict]:
    """Returns the loss of a batch as in TokenizerStage, or of rows of trajectory shards, and its metrics.

    The latter have "token_ids" int [b, n], "keep_k" int [b] and "path" [b, m + 1, h, w, c]
    (data/shards/trajectories.py).
    """
    if "path" not in batch:
      return super().loss_fn(params, batch, key, step)
    rows = self.stored_paths(batch)
    rows = jax.tree.map(lambda x: group(x, bucket_rows(x.shape[0], self.tokens.bucket_rows)), rows)
    return self._loss(params, rows, key, lambda length, rows: rows.replace(codes=rows.codes[:, :length]))

  def stored_paths(self, batch: Mapping) -> Paths:
    """Returns rows of trajectory shards, see loss_fn, as paths [b, ...]."""
    codes = fsq.ids_to_codes(batch["token_ids"], self.model.levels)
    every = (batch["path"].shape[1] - 1) // self.intervals  # states of the shards per state that is used
    return Paths(codes, batch["keep_k"], batch["path"][:, ::every].astype(jnp.float32))

  def latents_loss(
    self, params: Params, latents: jax.Array, key: jax.Array, teacher: jax.Array | None = None
  ) -> tuple[jax.Array, dict]:
    """Returns the loss of latents [b, h, w, c] and its metrics: each row gets a path of the teacher."""
    del teacher
    draw_key, key = jax.random.split(key)
    rows = self._draw(latents, draw_key)
    return self._loss(params, rows, key, functools.partial(self._paths, params))

  def paths(self, params: Params, latents: jax.Array, noise: jax.Array, keep_k: jax.Array) -> Paths:
    """Returns paths of the teacher, with codes [.., num_registers, code_dim], of which the first keep_k count.

    Args:
      params: of the encoder and the teacher.
      latents: [b, h, w, c], whole groups of rows.
      noise: first state of each path [b, h, w, c].
      keep_k: int [b], stratified in each group (nested.sample_keep_k).
    """
    n = self.tokens.num_registers
    rows = jax.tree.map(
      lambda x: group(x, bucket_rows(x.shape[0], self.tokens.bucket_rows)), Noised(latents, noise, keep_k)
    )

    def of_bucket(length, rows):
      paths = self._paths(params, length, rows)
      return paths.replace(codes=jnp.pad(paths.codes, ((0, 0), (0, n - length), (0, 0))))

    return self._run_buckets(rows, lambda buckets: [of_bucket(*bucket) for bucket in buckets])

  def _draw(self, latents: jax.Array, key: jax.Array) -> Noised:
    """Returns latents [b, h, w, c] as rows with noise and lengths."""
    order_key, noise_key, keep_key = jax.random.split(key, 3)
    size, n = latents.shape[0], self.tokens.num_registers
    count = bucket_rows(size, self.tokens.bucket_rows)
    order = jax.random.permutation(order_key, jnp.arange(count, dtype=jnp.int32))
    latents = group(latents, count)[:, order]  # lengths are assigned at random
    noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
    keep_k, _ = nested.sample_keep_k(keep_key, size // count, count, n, self.tokens.nested_dropout, 0.0)
    return Noised(latents, noise, keep_k)

  def _paths(self, params: Params, length: int, rows: Noised) -> Paths:
    """Returns the paths of the rows of a bucket, computed on `length` registers."""
    z: Any = self.model.apply({"params": params}, rows.latents, length, method="encode_registers")
    codes = fsq.quantize(z, self.model.levels)
    teacher = {"decoder": params["teacher"]}
    path = sample_path(self.teacher, teacher, codes, rows.keep_k, rows.noise, self.teacher_sampler, self.fast)
    times = 1 - jnp.arange(self.intervals + 1, dtype=jnp.float32) / self.intervals
    # [num_steps + 1, b, ...] -> [b, m + 1, ...]
    path = jnp.stack([flow.on_path(path, jnp.full(rows.keep_k.shape, t)) for t in times], axis=1)
    return jax.lax.stop_gradient(Paths(codes, rows.keep_k, path))

  def _loss(
    self, params: Params, rows: Any, key: jax.Array, paths: Callable[[int, Any], Paths]
  ) -> tuple[jax.Array, dict]:
    """Returns the loss and its metrics.

    Each row gives one interval for each number N of steps of config.distill.steps: a random one of the steps of the
    student's own sampler, from the latents that this sampler has reached. The target is the velocity that leads from
    there to the teacher's path of the same noise at the end of the interval, so errors of earlier steps are corrected.
    The loss is the squared error of the velocity divided by N: a step moves the latents by 1/N of its velocity, and a
    sampler takes N of them. Rows run in buckets, as in TokenizerStage.

    Args:
      params: of the model.
      rows: Noised or Paths, g groups of r rows.
      key: of the intervals.
      paths: (registers to compute, rows of a bucket) -> their paths.
    """
    shape, steps = (*rows.keep_k.shape, len(self.steps)), jnp.asarray(self.steps, jnp.int32)
    segment = jax.random.randint(key, shape, 0, steps, jnp.int32)
    # Computed once for all buckets, as in TokenizerStage: [..., g, r * n, f].
    flat = lambda x: x.reshape(len(x), -1)
    modulations = self._modulations(params, *map(flat, intervals_of(segment, steps)))

    def cut(rows: Any, first: int, end: int) -> Any:
      rows, segment, modulations = rows
      n = len(self.steps)
      return *bucket_of((rows, segment), first, end), cut_modulations(modulations, first * n, end * n)

    def run(buckets: list[tuple[int, Any]]) -> list[jax.Array]:
      return self._errors(params, [(paths(length, rows), *rest) for length, (rows, *rest) in buckets])

    losses = self._run_buckets((rows, segment, modulations), run, cut)  # [b, n]
    keep_k, size = ungroup(rows.keep_k), losses.shape[0]
    metrics = {"loss": (losses.mean(1).sum(), jnp.float32(size))}
    metrics |= {f"loss_n{n}": (losses[:, i].sum(), jnp.float32(size)) for i, n in enumerate(self.steps)}
    low = 0
    for high in nested.powers_of_two(self.tokens.num_registers):
      mask = (keep_k > low) & (keep_k <= high)
      metrics[f"loss_k{high}"] = jnp.where(mask, losses.mean(1), 0).sum(), mask.sum().astype(jnp.float32)
      low = high
    return losses.mean(), metrics

  def _errors(self, params: Params, buckets: Sequence[tuple[Paths, jax.Array, Any]]) -> list[jax.Array]:
    """Returns the errors [b, n] of the rows of each bucket, see _loss.

    Args:
      params: of the model.
      buckets: rows [b, ...] of each, their steps segment int [b, n], and modulations [..., b * n, f] or None.
    """
    repeat = lambda x: jnp.repeat(x, len(self.steps), axis=0)  # [b, ...] -> [b * n, ...]
    steps = jnp.asarray(self.steps, jnp.int32)
    starts = self._own_states(params, [(rows, segment) for rows, segment, _ in buckets])
    inputs, targets = [], []
    for (rows, segment, modulations), x_t in zip(buckets, starts, strict=True):
      x_r = rows.path[jnp.arange(rows.keep_k.size)[:, None], (segment + 1) * (self.intervals // steps)]
      targets.append((x_t - x_r) * steps[:, None, None, None])  # [b, n, h, w, c]
      t, interval = map(ungroup, intervals_of(segment, steps))
      inputs.append(
        Inputs(
          x_t=ungroup(x_t),
          t=t,
          codes=repeat(rows.codes),
          keep_k=repeat(rows.keep_k),
          drop_condition=jnp.zeros(segment.size, bool),
          modulations=modulations,
          interval=interval,
        )
      )
    velocities: Any = self.model.apply({"params": params}, inputs, method="velocity_batches")
    return [jnp.square(v.reshape(y.shape) - y).mean((2, 3, 4)) / steps for (v, _), y in zip(velocities, targets)]

  def _own_states(self, params: Params, buckets: Sequence[tuple[Paths, jax.Array]]) -> list[jax.Array]:
    """Returns the latents [b, n, h, w, c] at which the student's own samplers begin their steps segment int [b, n].

    The samplers of all numbers of steps take their first, second, ... steps together, in all buckets: sharded
    parameters are gathered as often as the longest sampler needs.
    """
    # Of each bucket and number of steps: states [b, k, h, w, c] that its sampler has reached.
    reached = [{n: [rows.path[:, :1]] for n in self.steps} for rows, _ in buckets]
    taken = 0
    for last in sorted({n - 1 for n in self.steps} - {0}):
      active = [n for n in self.steps if n > last]
      counts = jnp.asarray(active, jnp.float32)
      t, interval = intervals_of(jnp.arange(taken, last, dtype=jnp.float32)[:, None], counts)  # [k, a]
      modulations = self._modulations(params, t, interval)
      # [..., k, a, f] -> [k, ..., a, f]
      modulations = jax.tree.map(lambda x: jnp.moveaxis(x, -3, 0), modulations)

      def step(states: list[jax.Array], of_step: Any, active: list[int] = active, counts: jax.Array = counts) -> Any:
        t, modulations = of_step
        inputs = []
        for x, (rows, _) in zip(states, buckets, strict=True):
          size, repeat = rows.keep_k.size, functools.partial(jnp.repeat, repeats=len(active), axis=0)
          # [..., a, f] -> [..., b * a, f]
          of_rows = jax.tree.map(lambda m, size=size: jnp.tile(m, (size, 1)), modulations)
          drop = jnp.zeros(size * len(active), bool)
          inputs.append(Inputs(ungroup(x), jnp.tile(t, size), repeat(rows.codes), repeat(rows.keep_k), drop, of_rows))
        velocities: Any = self.model.apply({"params": params}, inputs, method="velocity_batches")
        steps = counts[:, None, None, None]
        states = [x - v.reshape(x.shape) / steps for x, (v, _) in zip(states, velocities, strict=True)]
        return states, states

      first = [jnp.stack([states[n][-1][:, -1] for n in active], axis=1) for states in reached]  # [b, a, h, w, c]
      _, found = jax.lax.scan(step, first, (t, modulations))
      for states, new in zip(reached, found, strict=True):
        for i, n in enumerate(active):
          states[n].append(new[:, :, i].swapaxes(0, 1))  # [k, b, h, w, c] -> [b, k, h, w, c]
      taken = last

    def begin(states: dict[int, list[jax.Array]], segment: jax.Array) -> jax.Array:
      row = jnp.arange(segment.shape[0])
      return jnp.stack([jnp.concatenate(states[n], 1)[row, segment[:, i]] for i, n in enumerate(self.steps)], axis=1)

    return [jax.lax.stop_gradient(begin(states, segment)) for states, (_, segment) in zip(reached, buckets)]
