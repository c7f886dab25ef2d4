"""The programs that are compiled ahead of time: those of the commands, with abstract arguments."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax.core.meta import unbox
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from flextok_jax.config import with_fields
from flextok_jax.core import flops
from flextok_jax.models.ar import sampling as ar_sampling
from flextok_jax.ops import nested
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import goodput, optim
from flextok_jax.training import inputs as inputs_lib
from flextok_jax.training.state import init_state, make_update, state_shardings

STAGES = {
  "train": ("tokenizer", "vae", "ar", "distill"),
  "sample": ("tokenizer", "distill"),
  "ar": ("ar",),
}  # job: stages that have it


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile and what is known about it before."""

  fn: Callable
  args: tuple  # ShapeDtypeStructs with shardings
  parts: dict[str, Any]  # the arguments by kind of memory
  out_shardings: Any
  donated: bool  # whether the first argument may be overwritten
  precision: str | None  # of products without one of their own; None: JAX's default
  batch: int  # images per call
  flops: int  # per call on all devices (core/flops.py)
  model_flops: int  # the same without what remat recomputes
  loop_trips: int = 1  # trip count assumed for data-dependent loops

  def lower(self) -> jax.stages.Lowered:
    """Traces and lowers the program for the devices of its arguments, as if they were the default devices.

    Arguments that it does not read (the encoder in sampling) are kept, as they occupy memory all the same.
    """
    device = next(iter(jax.tree.leaves(self.args)[0].sharding.device_set))
    donated = 0 if self.donated else ()
    with jax.default_device(device), jax.default_matmul_precision(self.precision):
      jitted = jax.jit(self.fn, donate_argnums=donated, out_shardings=self.out_shardings, keep_unused=True)
      return jitted.lower(*self.args)


def make_job(
  config: ConfigDict,
  name: str,
  mesh: jax.sharding.Mesh,
  per_device_batch: int | None,
  num_tokens: int | None,
  shard_update: bool = False,
) -> Job:
  """Returns the program of a job.

  Args:
    config: of a stage that has the job.
    name: a key of STAGES.
    mesh: of devices, which need not exist.
    per_device_batch: images per device and call; None: those of config.data.global_batch.
    num_tokens: tokens that "sample" decodes and "ar" draws; None: all.
    shard_update: of "train", see state_shardings.

  Raises:
    ValueError: a stage without the job, settings that do not fit together, or a batch that does not divide.
  """
  if config.stage not in STAGES[name]:
    jobs = ", ".join(job for job, stages in STAGES.items() if config.stage in stages)
    raise ValueError(f"stage {config.stage!r} has no job {name!r}, only {jobs}")
  config = config.copy_and_resolve_references()
  if per_device_batch is not None:
    if per_device_batch < 1:
      raise ValueError(f"per_device_batch={per_device_batch} must be at least 1")
    config.data.global_batch = per_device_batch * mesh.size
  sharding.check_batch(config.data.global_batch, config.optim.accumulate_steps if name == "train" else 1, mesh)
  if name == "train":
    if num_tokens is not None:
      raise ValueError(f"num_tokens={num_tokens} must be None for the job 'train': a step draws its own numbers")
    return _train(config, mesh, shard_update)
  most = config.ar.num_tokens if name == "ar" else config.tokens.num_registers
  num_tokens = most if num_tokens is None else num_tokens
  if not 1 <= num_tokens <= most:
    raise ValueError(f"num_tokens={num_tokens} is out of range: this model has 1 to {most} tokens")
  return {"sample": _sample, "ar": _ar}[name](config, mesh, num_tokens)


def _placed(tree: Any, shardings: Any) -> Any:
  """Returns ShapeDtypeStructs of a tree of arrays or shapes, with shardings."""
  one = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: one(x, shardings), tree)
  return jax.tree.map(one, tree, shardings)


def _shape(dtype, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _train(config: ConfigDict, mesh, shard_update: bool) -> Job:
  c, size = config, config.data.global_batch
  stage, optimizer = make_stage(c), optim.make_optimizer(c.optim, c.train.num_steps)
  key = jax.eval_shape(lambda: jax.random.key(0))
  boxed = jax.eval_shape(lambda key: init_state(stage, optimizer, key), key)
  shardings = state_shardings(boxed, mesh, shard_update)
  state = _placed(unbox(boxed), shardings)
  batch, key = (
    _placed(inputs_lib.abstract_batch(c, stage), sharding.batch_sharding(mesh)),
    _placed(key, sharding.replicated(mesh)),
  )
  flops = goodput.update_flops(c)
  return Job(
    fn=make_update(stage, optimizer, accumulate_steps=c.optim.accumulate_steps, decay=c.optim.ema_decay),
    args=(state, batch, key),
    parts={
      "parameters": state.params,
      "optimizer": state.opt_state,
      "EMA": state.ema,
      "frozen": state.frozen,
      "batch": batch,
    },
    out_shardings=(shardings, sharding.replicated(mesh)),
    donated=True,
    precision=None,
    batch=size,
    flops=flops,
    model_flops=flops if c.remat == "none" else goodput.update_flops(with_fields(c, {"remat": "none"})),
  )


def _params(config: ConfigDict, stage, mesh):
  """Returns all parameters, each in its compute dtype and sharded as flextok_jax.load does."""
  trained, frozen = jax.eval_shape(stage.init, jax.eval_shape(lambda: jax.random.key(0)))
  boxed = {**trained, **frozen}
  types = {name: jnp.dtype(config.vae.dtype if name == "vae" else config.dtype) for name in boxed}
  shapes = {
    name: jax.tree.map(lambda x, t=types[name]: jax.ShapeDtypeStruct(x.shape, t), part)
    for name, part in unbox(boxed).items()
  }
  return _placed(shapes, sharding.tree_shardings(boxed, mesh))


def _keys(size: int):
  return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))


def _precision(config: ConfigDict) -> str | None:
  """Returns the precision of products: as in flextok_jax.load, float32 means full precision outside of training."""
  return "highest" if config.dtype == "float32" else None


def _sample(config: ConfigDict, mesh, num_tokens: int) -> Job:
  c, size = config, config.data.global_batch
  stage, total = make_stage(c), c.tokens.num_registers
  slots = nested.padded_length(num_tokens, total) if c.fast else total
  params, rows = _params(c, stage, mesh), sharding.batch_sharding(mesh)
  inputs = _placed((_shape(jnp.int32, size, slots), _shape(jnp.int32, size), _keys(size)), rows)
  counted = make_stage(with_fields(c, {"attention": "xla"})).predict_fns["detokenize"]
  count = flops.count(counted, params, *inputs)
  return Job(
    stage.predict_fns["detokenize"],
    (params, *inputs),
    {"parameters": params, "batch": inputs},
    rows,
    False,
    _precision(c),
    size,
    count,
    count,
  )


def _ar(config: ConfigDict, mesh, num_tokens: int) -> Job:
  c, size, stage = config, config.data.global_batch, make_stage(config)
  guided = c.ar.condition != "none" and c.ar.guidance_scale != 1
  params, rows = _params(c, stage, mesh), sharding.batch_sharding(mesh)
  twice = 2 * size if guided else size
  text = inputs_lib.abstract_text(twice, c.dtype, **c.text) if c.ar.condition == "text" else {}
  if "text_ids" in text:  # the generator gets features of a text encoder that runs before it
    text["text_features"] = _shape(jnp.dtype(c.dtype), *text.pop("text_ids").shape, c.text.features)
  inputs = (
    _keys(size),
    _shape(jnp.int32, twice),
    text.get("text_features"),
    text.get("text_lengths"),
    _shape(jnp.int32, size, 0),
  )
  number: Any = _shape(jnp.float32)
  sampler = ar_sampling.TokenSampler(
    number if guided else None, number, number if c.ar.top_p else None, top_k=c.ar.top_k
  )
  scalars = _shape(jnp.int32), sampler  # the first is num_tokens
  placed, placed_scalars = _placed(inputs, rows), _placed(scalars, sharding.replicated(mesh))
  length = ar_sampling.padded_length(num_tokens, c.ar.num_tokens)
  make = lambda stage: functools.partial(ar_sampling.generate, stage.model, length=length, fast=c.fast)
  args = params, *placed, *placed_scalars
  count = flops.count(make(make_stage(with_fields(c, {"attention": "xla"}))), *args, while_trips=num_tokens)
  return Job(
    make(stage),
    args,
    {"parameters": params, "batch": (placed, placed_scalars)},
    (rows, rows),
    False,
    _precision(c),
    size,
    count,
    count,
    loop_trips=num_tokens,
  )
