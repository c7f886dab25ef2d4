"""The benchmark's jobs for tokenizers and VAEs."""

from collections.abc import Callable, Sequence
import dataclasses
import statistics
import types
from typing import Any

from flax.core.meta import unbox
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from flextok_jax.config import TOKENIZER_STAGES, with_fields
from flextok_jax.core import flops, timing
from flextok_jax.models.tokenizer.flextok import sample_latents
from flextok_jax.ops import attention, fsq, nested
from flextok_jax.stages import make_stage, repa
from flextok_jax.training import optim
from flextok_jax.training.state import init_state, make_update

PATHS = ("plain", "fast")
TEACHER = "teacher"  # the path of a student's job "detokenize" that the others are compared with
ONLY = "-"  # the path of a job that has only one
Compute = tuple[str, str | None]  # dtype, and precision of its products


@dataclasses.dataclass(frozen=True)
class Row:
  """The measurement of a job on a path."""

  job: str
  path: str
  num_tokens: int | None
  batch_size: int
  latents: bool  # without the VAE
  compute: Compute
  seconds: tuple[float, ...]  # of each timed call; index i of both paths is the same round
  compile_seconds: float  # to lower and compile
  program: str  # the same for the same program
  flops: int  # per call
  xla_flops: float | None  # per call, with loop bodies counted once
  program_bytes: int | None
  device_peak_bytes: int | None  # peak of the process on the device, if the device reports it
  attention: str
  shorter: dict[int, tuple[float, ...]] = dataclasses.field(
    default_factory=dict
  )  # seconds of calls for fewer tokens, by their number
  token_bytes: int | None = None  # bytes that a generated token reads at least

  @property
  def name(self) -> str:
    return self.job if self.num_tokens is None else f"{self.job} k={self.num_tokens}"

  @property
  def rates(self) -> tuple[float, float, float]:
    """Images per second: median, least, most."""
    median, most, least = (f(self.seconds) for f in (statistics.median, max, min))
    return self.batch_size / median, self.batch_size / most, self.batch_size / least

  @property
  def ms_per_token(self) -> float | None:
    """Median time of a call per token, for jobs that draw tokens one after another."""
    return 1e3 * statistics.median(self.seconds) / self.num_tokens if self.job == "ar" and self.num_tokens else None

  @property
  def flops_per_second(self) -> float:
    return self.flops / statistics.median(self.seconds)


class TokenizerBenchmark:
  """A model with random parameters and the programs that run it.

  Args:
    config: of stage "tokenizer" or "vae".
    paths: of PATHS.
    batch_size: images per call.
    latents: leaves the VAE out of tokenize, detokenize and train.

  Raises:
    ValueError: settings that do not fit together.
  """

  def __init__(self, config: ConfigDict, paths: tuple[str, ...], batch_size: int, latents: bool):
    if batch_size % config.optim.accumulate_steps:
      raise ValueError(
        f"batch_size={batch_size} is not a multiple of optim.accumulate_steps {config.optim.accumulate_steps}"
      )
    self.config, self.paths, self.batch_size = config, paths, batch_size
    self.has_tokens = config.stage in TOKENIZER_STAGES
    self.latents = latents and self.has_tokens
    self._compiler = timing.Compiler()
    self._kept: dict[str, Any] = {}

  def compute(self, job: str) -> Compute:
    """Returns dtype and precision of a job.

    As in flextok_jax.load, outside of training float32 means full precision: by default accelerators multiply in fewer
    bits.
    """
    c = self.config
    return self._dtype(job), "highest" if c.dtype == "float32" and job != "train" else None

  def prepare(self, job: str, num_tokens: int | None) -> tuple[tuple, dict[str, tuple[Callable, int]]]:
    """Returns the arguments of a job and {path: (function to compile for them, its FLOPs)}.

    The function of "train" is the update of a run, whose state may be donated.
    """
    if job == "train":
      self._kept.clear()  # room for the state
    args, make = getattr(self, f"_{job}")(*(() if num_tokens is None else (num_tokens,)))
    if job == "detokenize" and self.config.stage == "distill":
      run, counted = self._decoders(make), self._decoders(make, attention="xla")
      return args, {path: (fn, flops.count(counted[path], *args)) for path, fn in run.items()}
    paths = self.paths if self._has_paths(job) else (ONLY,)
    return args, {
      path: (fn, self._count(fn, make, path, args, num_tokens))
      for path in paths
      for fn in [make(self._stage(path), path == "fast")]
    }

  def _count(self, fn: Callable, make: Callable, path: str, args: tuple, num_tokens: int | None) -> int:
    """Returns the FLOPs of a call of fn, with the attention that can be counted."""
    if jax.default_backend() != "cpu" or self.config.attention not in ("auto", "xla"):  # else fn has it already
      fn = make(self._stage(path, attention="xla"), path == "fast")
    return flops.count(fn, *args, while_trips=self._while_trips(path, num_tokens))

  def _while_trips(self, path: str, num_tokens: int | None) -> int | Sequence[int]:
    """Returns the trip counts of the program's data-dependent loops, of which a tokenizer has none."""
    return ()

  def run(self, job: str, num_tokens: int | None, repeats: int, limit: float) -> list[Row]:
    """Measures a job in `repeats` rounds, or as many as begin within `limit` seconds; returns a row for each path."""
    args, made = self.prepare(job, num_tokens)
    compute, train = self.compute(job), job == "train"
    programs = {path: self._compiler(fn, args, compute[1], donated=train) for path, (fn, _) in made.items()}
    runs = {path: program.run for path, program in programs.items()}
    seconds = self._time(job, num_tokens, runs, args, repeats, limit)
    return [
      Row(
        job=job,
        path=path,
        num_tokens=num_tokens,
        batch_size=self.batch_size,
        latents=self.latents,
        compute=compute,
        seconds=tuple(seconds[path]),
        compile_seconds=program.seconds,
        program=program.digest,
        flops=made[path][1],
        xla_flops=timing.xla_flops(program.run),
        program_bytes=timing.program_bytes(program.run),
        device_peak_bytes=timing.device_peak_bytes(),
        attention=self.attention_of(job, path),
        shorter={n: tuple(s) for n, s in seconds.items() if path == "fast" and isinstance(n, int)},
      )
      for path, program in programs.items()
    ]

  def _time(
    self, job: str, num_tokens: int | None, runs: dict[str, Callable], args: tuple, repeats: int, limit: float
  ) -> dict[Any, list[float]]:
    """Returns seconds of the calls by path, and of the fast program's calls for fewer tokens by their number."""
    return timing.time_rounds(runs, args, repeats, limit, carried=job == "train")

  def _dtype(self, job: str) -> str:
    return self.config.dtype if self.has_tokens and job != "vae" else self.config.vae.dtype

  def _has_paths(self, job: str) -> bool:
    return self.has_tokens and job != "vae"

  def _stage(self, path: str, **fields: str):
    fast = self.config.fast if path == ONLY else path == "fast"
    return make_stage(with_fields(self.config, {"fast": fast, **fields}))

  def _key(self, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

  def _params(self, *names: str) -> dict:
    """Returns parts of the parameters, each in its compute dtype, as flextok_jax.load does."""
    for name in names:
      if name not in self._kept:
        self._kept |= self._random_params((name,), self.config.vae.dtype if name == "vae" else self.config.dtype)
    return {name: self._kept[name] for name in names}

  def _random_params(self, names: tuple[str, ...], dtype: str) -> dict:
    """Initialises parts; parameters that start at zero (modulations, heads, biases) become small random numbers."""

    def init(key):
      stage, parts = self._stage(ONLY), {}
      for some in (*unbox(stage.init(key)), *unbox(stage.init_auxiliary(key))):
        parts |= some
      return optax.tree.cast({name: parts[name] for name in names}, dtype)

    leaves, tree = jax.tree.flatten(jax.jit(init)(self._key(0)))
    # Drawn in float32: the same numbers for every dtype, but for their rounding.
    noise = jax.jit(lambda key, x: (0.02 * jax.random.normal(key, x.shape)).astype(x.dtype))
    zero = jax.device_get(jax.jit(lambda leaves: [~x.any() for x in leaves])(leaves))
    keys = [jax.random.fold_in(self._key(1), i) for i in range(len(leaves))]
    leaves = [noise(key, x) if is_zero else x for key, x, is_zero in zip(keys, leaves, zero)]
    return jax.tree.unflatten(tree, leaves)

  @property
  def _with_vae(self) -> tuple[str, ...]:
    """The VAE's part, if a job takes images and the model has one."""
    return () if self.latents or self.config.vae.kind == "pixels" else ("vae",)

  def _images(self) -> jax.Array:
    """uint8 [b, h, w, 3]."""
    side = self.config.image_size
    return jax.random.randint(self._key(2), (self.batch_size, side, side, 3), 0, 256, jnp.uint8)

  def _noise(self) -> jax.Array:
    """[b, h, w, c] of latents."""
    shape = self._stage(ONLY).model.latent_shape(*[self.config.image_size] * 2)
    return jax.random.normal(self._key(3), (self.batch_size, *shape))

  def _tokenize(self, num_tokens: int):
    def make(stage, fast: bool):
      model, total = stage.model, self.config.tokens.num_registers
      length = nested.padded_length(num_tokens - 1, total) if fast else total

      def fn(params, x):
        if not self.latents:
          return model.apply({"params": params}, x, length, method="tokenize")
        return fsq.codes_to_ids(model.apply({"params": params}, x, length, method="encode"), model.levels)

      return fn

    return (self._params("encoder", *self._with_vae), self._noise() if self.latents else self._images()), make

  def _detokenize(self, num_tokens: int):
    def make(stage, fast: bool):
      total = self.config.tokens.num_registers
      slots = nested.padded_length(num_tokens, total) if fast else total

      def fn(params, ids, keep_k, noise):
        z = sample_latents(stage.model, params, ids[:, :slots], keep_k, noise, stage.sampler, fast)
        return z if self.latents else stage.model.apply({"params": params}, z, method="decode_latents")

      return fn

    tokens, size = self.config.tokens, self.batch_size
    ids = jax.random.randint(self._key(4), (size, tokens.num_registers), 0, fsq.num_codes(tokens.levels), jnp.int32)
    params = self._params("decoder", *self._with_vae)
    return (params, ids, jnp.full(size, num_tokens), self._noise()), make

  def _decoders(self, make: Callable, **fields: str) -> dict[str, Callable]:
    """Returns the job "detokenize" of the teacher and of its student at each number of steps, all on the fast path."""
    stage: Any = self._stage("fast", **fields)
    of_teacher = types.SimpleNamespace(model=stage.teacher, sampler=stage.teacher_sampler)
    of_student = {
      f"{n} step{'s' * (n > 1)}": types.SimpleNamespace(
        model=stage.model, sampler=dataclasses.replace(stage.sampler, num_steps=n)
      )
      for n in sorted(stage.steps, reverse=True)
    }
    return {path: make(part, True) for path, part in ({TEACHER: of_teacher} | of_student).items()}

  def _vae(self):
    def make(stage, _):  # one path
      def fn(params, images):
        if not self.has_tokens:
          return stage.predict_fns["reconstruct"](params, images)
        z = stage.model.apply({"params": params}, images, method="encode_latents")
        return stage.model.apply({"params": params}, z, method="decode_latents")

      return fn

    return (self._params("vae"), self._images()), make

  def _train(self):
    c = self.config
    optimizer = self._optimizer()

    def make(stage, _: bool):
      if self.latents:  # the batch's images are latents
        loss = lambda params, batch, key, step: stage.latents_loss(params, batch["image"], key, batch.get("teacher"))
        return self._update(types.SimpleNamespace(loss_fn=loss, attached=stage.attached), optimizer)
      return self._update(stage, optimizer)

    trained, frozen = self._trained_and_frozen
    inputs = {"image": self._noise() if self.latents else self._images()}
    if self.has_tokens and repa.section(c) is not None:
      shape = self.batch_size, repa.teacher_grid(c) ** 2, c.repa.features
      inputs["teacher"] = jax.random.normal(self._key(7), shape, c.repa.dtype)
    return self._update_args(optimizer, trained, frozen, inputs), make

  @property
  def _trained_and_frozen(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the parts that the stage trains, and of its frozen parts, without a VAE that no job uses."""
    stage = self._stage(ONLY)
    model, auxiliary = (jax.eval_shape(init, self._key(0)) for init in (stage.init, stage.init_auxiliary))
    unused = () if self._with_vae or not self.has_tokens else ("vae",)
    return (*model[0], *auxiliary[0]), tuple(name for name in (*model[1], *auxiliary[1]) if name not in unused)

  def _optimizer(self) -> optax.GradientTransformation:
    return optim.make_optimizer(self.config.optim, self.config.train.num_steps)

  def _update(self, stage, optimizer: optax.GradientTransformation) -> Callable:
    c = self.config.optim
    return make_update(stage, optimizer, accumulate_steps=c.accumulate_steps, decay=c.ema_decay)

  def _update_args(
    self, optimizer: optax.GradientTransformation, trained: tuple[str, ...], frozen: tuple[str, ...], inputs: dict
  ) -> tuple:
    """Returns state, batch and key of an update whose stage has these parts."""
    given = self._random_params(trained, "float32"), self._random_params(frozen, "float32") if frozen else {}

    def init(given, key):
      stage = types.SimpleNamespace(init=lambda key: given, init_auxiliary=lambda key: ({}, {}), lora=None)
      return init_state(stage, optimizer, key)

    state = jax.jit(init, donate_argnums=0)(given, self._key(5))
    return state, {**inputs, "unreadable": jnp.zeros(self.batch_size, jnp.int32)}, self._key(6)

  def attention_of(self, job: str, path: str) -> str:
    """Returns the implementation of attention, of encoder and decoder if a job has both; the VAE's is XLA's."""
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    halves = {"tokenize": ("encoder",), "detokenize": ("decoder",), "train": ("encoder", "decoder")}.get(job, ())
    names = [
      attention.choose_implementation(c.attention, c[half].head_dim, dtype, masked=half == "encoder")
      for half in halves
      if self.has_tokens
    ] or ["xla"]
    return "+".join(dict.fromkeys(names))
