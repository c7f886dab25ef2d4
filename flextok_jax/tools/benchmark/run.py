"""Runs jobs of the benchmark on the first device."""

from collections.abc import Callable, Sequence
import json
from pathlib import Path

from ml_collections import ConfigDict

from flextok_jax.config import TOKENIZER_STAGES
from flextok_jax.core import timing
from flextok_jax.inference import decoding
from flextok_jax.tools.benchmark.generator import GeneratorBenchmark
from flextok_jax.tools.benchmark.jobs import Row
from flextok_jax.tools.benchmark.parity import compare
from flextok_jax.tools.benchmark.repa import RepaBenchmark
from flextok_jax.tools.benchmark.report import Peaks, markdown

JOBS = ("tokenize", "detokenize", "vae", "ar", "train", "repa")  # in the order in which they run


def benchmark(
  config: ConfigDict,
  jobs: Sequence[str],
  paths: tuple[str, ...],
  *,
  num_tokens: Sequence[int] = (),
  batch_size: int = 4,
  latents: bool = True,
  repeats: int = 5,
  seconds: float = float("inf"),
  save: Callable[[list[Row], Peaks], None] = lambda rows, peaks: None,
) -> tuple[list[Row], Peaks]:
  """Measures jobs of a model with random parameters.

  Args:
    config: of the model and its training.
    jobs: of jobs_of(config), and "repa" for a tokenizer with REPA.
    paths: "plain" and "fast", or one of them.
    num_tokens: token counts of tokenize, detokenize and ar; (): see token_counts.
    batch_size: images per call.
    latents: leaves the VAE out of tokenize, detokenize and train.
    repeats: timed rounds of each job.
    seconds: no round of a job begins after this time; one is timed in any case.
    save: is called with the results so far after each job.

  Returns:
    (rows, peaks): results, and the peaks of matrix products measured before and after.

  Raises:
    ValueError: settings that do not fit together.
  """
  counts = token_counts(num_tokens, config)
  make = GeneratorBenchmark if config.stage == "ar" else RepaBenchmark
  bench = make(config, paths, batch_size, latents)
  computes = sorted({bench.compute(job) for job in jobs}, key=str)
  peaks: Peaks = {compute: [timing.matmul_peak(*compute)] for compute in computes}
  rows: list[Row] = []
  for job in jobs:
    for count in counts if job in ("tokenize", "detokenize", "ar") else (None,):
      for row in bench.run(job, count, repeats, seconds):
        rows.append(row)
        print(f"measured {row.name}, {row.path}: {timing.digits(row.rates[0])} images/s", flush=True)
      save(rows, peaks)
  for compute in computes:
    peaks[compute].append(timing.matmul_peak(*compute))
  save(rows, peaks)
  return rows, peaks


def parity(
  config: ConfigDict,
  names: Sequence[str],
  paths: tuple[str, ...],
  *,
  num_tokens: Sequence[int],
  batch_size: int,
  latents: bool,
) -> list[dict]:
  """Compares results instead of measuring times; arguments as benchmark's, result as parity.compare's."""
  make = GeneratorBenchmark if config.stage == "ar" else RepaBenchmark
  return compare(make, config, names, paths, token_counts(num_tokens, config), batch_size, latents)


def read_lines(folder: Path) -> dict[str, list[dict]]:
  """Returns the JSON lines of the benchmark in a folder by the names of its files, without .jsonl, in their order.

  Raises:
    FileNotFoundError: there is none.
    ValueError: another file is among them.
  """
  paths = sorted(folder.glob("*.jsonl"))
  if not paths:
    raise FileNotFoundError(f"no results (.jsonl) in {folder}: write some with --out={folder}/NAME.jsonl")
  found: dict[str, list[dict]] = {}
  for path in paths:
    try:
      found[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
      markdown({path.stem: found[path.stem]})
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError) as e:
      raise ValueError(f"{path} has no results of flextok_jax.benchmark: {type(e).__name__}: {e}") from None
  return found


def jobs_of(config: ConfigDict) -> tuple[str, ...]:
  """Returns the jobs of a config, without "repa"."""
  if config.stage not in TOKENIZER_STAGES:
    return (config.stage, "train")
  return tuple(job for job in ("tokenize", "detokenize", "vae", "train") if job != "vae" or config.vae.kind != "pixels")


def token_counts(requested: Sequence[int], config: ConfigDict) -> tuple[int, ...]:
  """Returns the token counts to measure, ascending; by default 1, 8, 32 and all of a tokenizer, all of a generator.

  Raises:
    ValueError: a count that the model does not have.
  """
  if config.stage == "vae":
    return ()
  if config.stage == "ar":
    return decoding.token_counts(requested or [config.ar.num_tokens], config.ar.num_tokens)
  total = config.tokens.num_registers
  return decoding.token_counts(requested or [k for k in (1, 8, 32) if k < total] + [total], total)
