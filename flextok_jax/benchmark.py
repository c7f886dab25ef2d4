"""Measures speed, memory and FLOPs of every job, the fast path beside the plain one in one process.

python -m flextok_jax.benchmark --config=configs/X.py [--jobs=tokenize,train] [--num_tokens=1,8] [--out=FILE.jsonl]

Parameters and inputs are random and the same for both paths; all runs on the first device. A round calls each path
once, and their order turns from round to round, so that whatever else the machine does meets both. Prints a table, and
how many times faster the fast path is; --out gets a JSON line for each row, ratio and peak.

FLOPs are those of the matrix products and convolutions that the path really runs (flextok_jax/flops.py): the fast path
has fewer. MFU is FLOPs / time / peak, and the peak that of the fastest matrix product measured here in the job's dtype.
XLA's own count stands beside: it has elementwise work too, but the body of a loop (over blocks, steps) only once, and
nothing of other libraries' kernels.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import json
from pathlib import Path
import statistics
import types

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_flags
import optax

from flextok_jax import cli, files, flops, timing
from flextok_jax.evals import reconstruction
from flextok_jax.models.flextok import sample_latents
from flextok_jax.ops import attention, fsq
from flextok_jax.stages import make_stage
from flextok_jax.training import optim
from flextok_jax.training.state import init_state, make_update, unbox

JOBS = ("tokenize", "detokenize", "vae", "train")  # in the order in which they run
PATHS = ("plain", "fast")
ONLY = "-"  # the path of a job that has but one
Compute = tuple[str, str | None]  # dtype, and precision of its products

_TABLE = ("job", "tokens", "path", "images/s", "(min .. max)", "compile s", "GFLOP", "by XLA", "GFLOP/s", "MFU",
          "memory MB", "attention")


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  config_flags.DEFINE_config_file("config", None, "The model and its training.", flag_values=values)
  flags.DEFINE_list("jobs", [], f"Of {', '.join(JOBS)}; default: all that the config has.", flag_values=values)
  flags.DEFINE_list("paths", list(PATHS), "plain, fast or both.", flag_values=values)
  flags.DEFINE_list("num_tokens", [], "Token counts of tokenize and detokenize; default: 1, 8, 32 and all.",
                    flag_values=values)
  flags.DEFINE_integer("batch_size", 4, "Images a call.", flag_values=values)
  flags.DEFINE_string("dtype", None, "In place of config.dtype; the VAE has its own, config.vae.dtype.",
                      flag_values=values)
  flags.DEFINE_bool("latents", True, "Latents in and out, without the VAE; --nolatents: images.", flag_values=values)
  flags.DEFINE_integer("repeats", 5, "Timed rounds, after one that is not timed.", flag_values=values)
  flags.DEFINE_float("seconds", float("inf"), "Begins no round of a job after so long; one is timed in any case.",
                     flag_values=values)
  flags.DEFINE_string("out", None, "File for the JSON lines, written anew.", flag_values=values)


def main(values: flags.FlagValues):
  """Measures what the flags ask for."""
  if values.config is None:
    raise ValueError("nothing to measure: give --config=configs/X.py")
  for name, least in (("batch_size", 1), ("repeats", 1), ("seconds", 0)):
    if not values[name].value >= least:
      raise ValueError(f"--{name}={values[name].value} must be at least {least}")
  config = values.config.copy_and_resolve_references()
  config.dtype = values.dtype or config.dtype
  jobs = _choices("jobs", values.jobs or jobs_of(config), JOBS)
  for job in jobs:
    if job not in jobs_of(config):
      kind = f"stage {config.stage!r}, vae.kind {config.vae.kind!r}"
      raise ValueError(f"--jobs: there is no job {job!r} with {kind}, only {', '.join(jobs_of(config))}")
  counts = token_counts(values.num_tokens, config.tokens.num_registers) if config.stage == "tokenizer" else ()
  bench = Benchmark(config, _choices("paths", values.paths, PATHS), values.batch_size, values.latents)

  # Rows are written as they come, so that a run cut short leaves what it has measured.
  save = functools.partial(_write, Path(values.out)) if values.out else lambda rows, peaks: None
  computes = sorted({bench.compute(job) for job in jobs}, key=str)
  peaks = {c: [timing.matmul_peak(*c)] for c in computes}
  rows = []
  for job in jobs:
    for count in counts if job in ("tokenize", "detokenize") else (None,):
      for row in bench.run(job, count, values.repeats, values.seconds):
        rows.append(row)
        print(f"measured {row.name}, {row.path}: {timing.digits(row.rates[0])} images/s", flush=True)
      save(rows, peaks)
  for c in computes:
    peaks[c].append(timing.matmul_peak(*c))
  save(rows, peaks)
  print("\n" + format_report(rows, peaks) + "\n")
  for (dtype, precision), (start, end) in peaks.items():
    busy = ": the machine was busy, MFU tells little" if max(start, end) > 1.25 * min(start, end) else ""
    full = ", full precision" if precision else ""
    print(f"peak of matrix products in {dtype}{full}: {start / 1e9:.1f} GFLOP/s at the start, {end / 1e9:.1f} at the "
          f"end; MFU is of the larger{busy}")
  print("memory: arguments, outputs and temporaries of the compiled program")
  if (held := timing.device_peak_bytes()) is not None:
    print(f"most that the process ever held on the device, in all jobs and paths: {held / 1e6:.1f} MB")


def jobs_of(config: ConfigDict) -> tuple[str, ...]:
  """Returns the jobs that a config has."""
  if config.stage == "vae":
    return ("vae", "train")
  return tuple(job for job in JOBS if job != "vae" or config.vae.kind == "autoencoder_kl")


def token_counts(requested: Iterable[str], num_registers: int) -> tuple[int, ...]:
  """Returns the counts of --num_tokens, ascending; by default 1, 8, 32 and num_registers, as far as there are so many.

  Raises:
    ValueError: no whole number, or outside 1..num_registers.
  """
  try:
    counts = [int(item) for item in requested]
  except ValueError as e:
    raise ValueError(f"--num_tokens takes whole numbers separated by commas: {e}") from None
  counts = counts or [k for k in (1, 8, 32) if k < num_registers] + [num_registers]
  return reconstruction.token_counts(counts, num_registers)


def _choices(flag: str, items: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the items, in the order of `known`; ValueError for one that is not there."""
  for item in items:
    if item not in known:
      raise ValueError(f"--{flag}: unknown {item!r}, one of {', '.join(known)}")
  if not items:
    raise ValueError(f"--{flag} is empty: give some of {', '.join(known)}")
  return tuple(item for item in known if item in items)


@dataclasses.dataclass(frozen=True)
class Row:
  """What was measured of one job on one path."""

  job: str
  path: str
  num_tokens: int | None
  batch_size: int
  latents: bool  # the VAE takes no part
  compute: Compute
  seconds: tuple[float, ...]  # of each timed call; the i-th of both paths are of one round
  compile_seconds: float  # to lower and compile
  program: str  # the same for the same program
  flops: int  # of a call
  xla_flops: float | None  # of a call, loop bodies once
  program_bytes: int | None
  device_peak_bytes: int | None  # most that the process ever held on the device, where the device tells
  attention: str

  @property
  def name(self) -> str:
    return self.job if self.num_tokens is None else f"{self.job} k={self.num_tokens}"

  @property
  def rates(self) -> tuple[float, float, float]:
    """Images a second: median, least, most."""
    return tuple(self.batch_size / f(self.seconds) for f in (statistics.median, max, min))

  @property
  def flops_per_second(self) -> float:
    return self.flops / statistics.median(self.seconds)


class Benchmark:
  """A model of random parameters, and the programs that run it.

  Args:
    config: of any stage.
    paths: of PATHS.
    batch_size: images a call.
    latents: leaves the VAE out of tokenize, detokenize and train.

  Raises:
    ValueError: settings that do not fit together.
  """

  def __init__(self, config: ConfigDict, paths: tuple[str, ...], batch_size: int, latents: bool):
    if batch_size % config.optim.accumulate_steps:
      raise ValueError(f"--batch_size={batch_size} is not a multiple of optim.accumulate_steps "
                       f"{config.optim.accumulate_steps}")
    self.config, self.paths, self.batch_size = config, paths, batch_size
    self.has_tokens = config.stage == "tokenizer"
    self.latents = latents and self.has_tokens
    self._compiler, self._kept = timing.Compiler(), {}

  def compute(self, job: str) -> Compute:
    """Returns what a job computes in.

    As in flextok_jax.load, float32 means float32 outside of training: accelerators would multiply in fewer bits.
    """
    c = self.config
    dtype = c.dtype if self.has_tokens and job != "vae" else c.vae.dtype
    return dtype, "highest" if c.dtype == "float32" and job != "train" else None

  def prepare(self, job: str, num_tokens: int | None) -> tuple[tuple, dict[str, tuple[Callable, int]]]:
    """Returns the arguments of a job, and by path the function to compile for them and its FLOPs.

    That of "train" is the update of a run, whose state may be donated.
    """
    if job == "train":
      self._kept.clear()  # room for the state
    args, make = getattr(self, f"_{job}")(*(() if num_tokens is None else (num_tokens,)))
    paths = self.paths if self.has_tokens and job != "vae" else (ONLY,)
    return args, {path: make(self._stage(path), path == "fast") for path in paths}

  def run(self, job: str, num_tokens: int | None, repeats: int, limit: float) -> list[Row]:
    """Measures a job, a row a path, in `repeats` rounds or as many as begin within `limit` seconds."""
    args, made = self.prepare(job, num_tokens)
    compute, train = self.compute(job), job == "train"
    programs = {path: self._compiler(fn, args, compute[1], donated=train) for path, (fn, _) in made.items()}
    runs = {path: program.run for path, program in programs.items()}
    seconds = timing.time_rounds(runs, args, repeats, limit, carried=train)
    return [
        Row(job=job, path=path, num_tokens=num_tokens, batch_size=self.batch_size, latents=self.latents,
            compute=compute, seconds=tuple(seconds[path]), compile_seconds=program.seconds, program=program.digest,
            flops=made[path][1], xla_flops=timing.xla_flops(program.run),
            program_bytes=timing.program_bytes(program.run), device_peak_bytes=timing.device_peak_bytes(),
            attention=self._attention(job))
        for path, program in programs.items()
    ]

  def _stage(self, path: str):
    config = self.config.copy_and_resolve_references()
    config.fast = config.fast if path == ONLY else path == "fast"
    return make_stage(config)

  def _key(self, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

  def _params(self, *names: str) -> dict:
    """Parts of the parameters, each in the type that computes with it, as flextok_jax.load keeps them."""
    for name in names:
      if name not in self._kept:
        self._kept |= self._random_params((name,), self.config.vae.dtype if name == "vae" else self.config.dtype)
    return {name: self._kept[name] for name in names}

  def _random_params(self, names: tuple[str, ...], dtype: str) -> dict:
    """Initialises parts; what starts at zero (modulations, heads, biases) becomes small random numbers."""

    def init(key):
      params, frozen = unbox(self._stage(ONLY).init(key))
      return optax.tree.cast({name: {**params, **frozen}[name] for name in names}, dtype)

    leaves, tree = jax.tree.flatten(jax.jit(init)(self._key(0)))
    noise = jax.jit(lambda key, x: 0.02 * jax.random.normal(key, x.shape, x.dtype))
    leaves = [x if x.any() else noise(jax.random.fold_in(self._key(1), i), x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, leaves)

  @property
  def _with_vae(self) -> tuple[str, ...]:
    """The VAE's part, where a job of images has one."""
    return () if self.latents or self.config.vae.kind == "pixels" else ("vae",)

  def _vae_share(self, count: Callable[[ConfigDict, int], int]) -> int:
    """FLOPs of that part."""
    return count(self.config, self.batch_size) if self._with_vae else 0

  def _images(self) -> jax.Array:
    """uint8 [b, h, w, 3]."""
    side = self.config.image_size
    return jax.random.randint(self._key(2), (self.batch_size, side, side, 3), 0, 256, jnp.uint8)

  def _noise(self) -> jax.Array:
    """[b, h, w, c] of latents."""
    shape = self._stage(ONLY).model.latent_shape(self.config.image_size)
    return jax.random.normal(self._key(3), (self.batch_size, *shape))

  def _tokenize(self, num_tokens: int):
    def make(stage, fast: bool):
      model, length = stage.model, flops.encoded(self.config, num_tokens, fast)

      def fn(params, x):
        if not self.latents:
          return model.apply({"params": params}, x, length, method="tokenize")
        return fsq.codes_to_ids(model.apply({"params": params}, x, length, method="encode"), model.levels)

      count = flops.tokenize(self.config, num_tokens, self.batch_size, fast)
      return fn, count + self._vae_share(flops.vae_encode)

    return (self._params("encoder", *self._with_vae), self._noise() if self.latents else self._images()), make

  def _detokenize(self, num_tokens: int):
    def make(stage, fast: bool):
      slots = flops.decoded(self.config, num_tokens, fast)

      def fn(params, ids, keep_k, noise):
        z = sample_latents(stage.model, params, ids[:, :slots], keep_k, noise, **stage.sampler)
        return z if self.latents else stage.model.apply({"params": params}, z, method="decode_latents")

      count = flops.sampler(self.config, num_tokens, self.batch_size, fast)
      return fn, count + self._vae_share(flops.vae_decode)

    tokens, size = self.config.tokens, self.batch_size
    ids = jax.random.randint(self._key(4), (size, tokens.num_registers), 0, fsq.num_codes(tokens.levels), jnp.int32)
    params = self._params("decoder", *self._with_vae)
    return (params, ids, jnp.full(size, num_tokens), self._noise()), make

  def _vae(self):
    def make(stage, _):  # one path
      def fn(params, images):
        if not self.has_tokens:
          return stage.predict_fns["reconstruct"](params, images)
        z = stage.model.apply({"params": params}, images, method="encode_latents")
        return stage.model.apply({"params": params}, z, method="decode_latents")

      return fn, flops.vae_encode(self.config, self.batch_size) + flops.vae_decode(self.config, self.batch_size)

    return (self._params("vae"), self._images()), make

  def _train(self):
    c, optimizer = self.config, optim.make_optimizer(self.config.optim, self.config.train.num_steps)
    parts = c.optim.accumulate_steps

    def make(stage, fast: bool):
      if not self.has_tokens:
        count = flops.train_vae(c, self.batch_size)
      else:
        count = parts * flops.train(c, self.batch_size // parts, fast) + self._vae_share(flops.vae_encode)
      if self.latents:  # the update's images are latents
        loss_fn = lambda params, batch, key, stage=stage: stage.latents_loss(params, batch["image"], key)
        stage = types.SimpleNamespace(loss_fn=loss_fn)
      return make_update(stage, optimizer, accumulate_steps=parts, decay=c.optim.ema_decay), count

    trained, frozen = (("encoder", "decoder"), self._with_vae) if self.has_tokens else (("vae",), ())
    given = self._random_params(trained, "float32"), self._random_params(frozen, "float32") if frozen else {}
    images = self._noise() if self.latents else self._images()
    batch = {"image": images, "unreadable": jnp.zeros(self.batch_size, jnp.int32)}
    state = init_state(types.SimpleNamespace(init=lambda key: given), optimizer, self._key(5))
    return (state, batch, self._key(6)), make

  def _attention(self, job: str) -> str:
    """Implementation of attention, of encoder and decoder where a job has both; the VAE's is XLA's."""
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    halves = {"tokenize": ("encoder",), "detokenize": ("decoder",), "train": ("encoder", "decoder")}.get(job, ())
    names = [attention.choose(c.attention, c[half].head_dim, dtype, masked=half == "encoder")
             for half in halves if self.has_tokens] or ["xla"]
    return "+".join(dict.fromkeys(names))


def ratios(rows: Iterable[Row]) -> list[dict]:
  """Returns how many times faster the fast path is where both ran: of the medians, and least and most in a round."""
  plain, result = {row.name: row for row in rows if row.path == "plain"}, []
  for row in rows:
    if row.path == "fast" and row.name in plain:
      pairs = [p / f for p, f in zip(plain[row.name].seconds, row.seconds)]
      result.append({
          "kind": "ratio", "job": row.job, "num_tokens": row.num_tokens, "rounds": len(pairs),
          "fast_over_plain": row.rates[0] / plain[row.name].rates[0], "min": min(pairs), "max": max(pairs),
          "same_program": row.program == plain[row.name].program,
      })
  return result


def _write(path: Path, rows: list[Row], peaks: dict[Compute, list[float]]):
  """Writes rows, ratios and peaks, a JSON object a line; the field "kind" tells them apart."""
  device = {"platform": jax.devices()[0].platform, "device": jax.devices()[0].device_kind}
  lines = []
  for row in rows:
    fields, peak = dataclasses.asdict(row), max(peaks[row.compute])
    speed = dict(zip(("images_per_second", "images_per_second_min", "images_per_second_max"), row.rates))
    rate = row.flops_per_second
    speed |= {"flops_per_second": rate, "peak_flops_per_second": peak, "mfu": rate / peak}
    dtype, precision = fields.pop("compute")
    lines.append({"kind": "row", **fields, "dtype": dtype, "precision": precision, **speed, **device})
  lines += ratios(rows)
  for (dtype, precision), measured in peaks.items():
    lines.append({"kind": "peak", "dtype": dtype, "precision": precision, "flops_per_second": measured, **device})
  files.write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def format_report(rows: list[Row], peaks: dict[Compute, list[float]]) -> str:
  """Returns a table of the rows (images/s: the median and its range; FLOPs of a call), and the ratios below."""
  cells = [_TABLE]
  for row in rows:
    rate, least, most = map(timing.digits, row.rates)
    unknown = lambda value, scale: "?" if value is None else timing.digits(value / scale)
    cells.append((
        row.job, str(row.num_tokens or ""), row.path, rate, f"({least} .. {most})", f"{row.compile_seconds:.1f}",
        timing.digits(row.flops / 1e9), unknown(row.xla_flops, 1e9), timing.digits(row.flops_per_second / 1e9),
        f"{row.flops_per_second / max(peaks[row.compute]):.1%}", unknown(row.program_bytes, 1e6), row.attention))
  widths = [max(map(len, column)) for column in zip(*cells)]
  sides = [str.ljust if name in ("job", "path", "attention") else str.rjust for name in _TABLE]
  lines = ["  ".join(side(c, w) for side, c, w in zip(sides, line, widths)).rstrip() for line in cells]
  for r in ratios(rows):
    name = r["job"] + (f" k={r['num_tokens']}" if r["num_tokens"] else "")
    same = "; they are the same program" if r["same_program"] else ""
    lines.append(f"{name}: fast is {r['fast_over_plain']:.2f} times as fast as plain "
                 f"({r['min']:.2f} .. {r['max']:.2f} in {r['rounds']} rounds{same})")
  return "\n".join(lines)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
