"""The benchmark command on a tiny model: rows, ratios, table, files and errors; times are not checked."""

import json
import math
from pathlib import Path

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax import benchmark
from flextok_jax.configs import debug
from flextok_jax.core import timing
from flextok_jax.ops import nested
from flextok_jax.tools.benchmark import generator as benchmark_ar
from flextok_jax.tools.benchmark import jobs as benchmark_jobs
from flextok_jax.tools.benchmark import run as run_jobs
from tests.support.commands import fails, run, shell

ROOT = Path(__file__).parents[2]
matmul_peak = timing.matmul_peak
NUMBERS = (
  "images_per_second",
  "compile_seconds",
  "flops",
  "xla_flops",
  "flops_per_second",
  "peak_flops_per_second",
  "mfu",
  "program_bytes",
)
CONFIG = """
from flextok_jax import config as common

def get_config():
  part = dict(width=32, depth=1, head_dim=16)
  return common.derive(**{
    **dict(image_size=16, dtype="float32", encoder=part, decoder=part, tokens=dict(num_registers=16),
           vae=dict(block_out_channels=(32,), layers_per_block=1), sampler=dict(num_steps=2)),
    **OVERRIDES})
"""

GENERATOR = dict(
  stage="ar",
  ar=dict(width=32, depth=1, head_dim=16, num_ids=60, num_tokens=40, guidance_scale=2.0),
  text=dict(encoder="bytes", max_length=6, features=16, mlp_hidden=8, depth=1, head_dim=16),
)


def config_file(folder, **overrides):
  path = folder / f"config_{len(list(folder.iterdir()))}.py"
  path.write_text(CONFIG.replace("OVERRIDES", repr(overrides)))
  return path


def read(path):
  """Returns the JSON lines by kind."""
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  return [[line for line in lines if line["kind"] == kind] for kind in ("row", "ratio", "peak", "span")]


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
  """Shrinks the matrix products that measure the peak, which take seconds and are not tested here."""
  monkeypatch.setattr(timing, "matmul_peak", lambda dtype, precision: 1e9)


def test_a_student_beside_its_teacher(tmp_path):
  """The job "detokenize" of a student: FLOPs by evaluations, of which the guided teacher takes two per step."""
  out = tmp_path / "rows.jsonl"
  fields = dict(stage="distill", sampler=dict(num_steps=2, guidance="none"), tokens=dict(num_registers=4))
  sampler = dict(num_steps=5, guidance="cfg", guidance_scale=2.0)
  file = tmp_path / "student.py"
  file.write_text(
    "from tests.support.tiny import tiny_config\nfrom flextok_jax.config import with_fields\n"
    f"get_config = lambda: with_fields(tiny_config(**{fields!r}, distill=dict(steps=(1, 4), sampler={sampler!r})), "
    "{'decoder.interval': True})\n"
  )
  given = f"--config={file}", "--jobs=detokenize,train", "--paths=fast", "--num_tokens=2", "--repeats=2"
  run(benchmark, *given, f"--out={out}")
  rows, ratios, *_ = read(out)
  assert [row["path"] for row in rows] == ["teacher", "4 steps", "1 step", "fast"]
  flops = [row["flops"] for row in rows[:3]]
  assert flops[0] / 10 == pytest.approx(flops[1] / 4, rel=0.1) == pytest.approx(flops[2], rel=0.1)
  assert [(r["path"], r["over"]) for r in ratios] == [("4 steps", "teacher"), ("1 step", "teacher")]
  assert all(r["times_as_fast"] > 0 for r in ratios)


def test_all_jobs_on_both_paths(tmp_path, capsys):
  out = tmp_path / "deep" / "rows.jsonl"
  half_null = dict(tokens=dict(num_registers=16, null_prob=0.5))  # one of two rows has a bucket of its own
  given = f"--config={config_file(tmp_path, **half_null)}"
  run(benchmark, given, "--num_tokens=16,1", "--repeats=2", "--batch_size=2", f"--out={out}")
  rows, ratios, peaks, spans = read(out)
  both = [("tokenize", 1), ("tokenize", 16), ("detokenize", 1), ("detokenize", 16), ("train", None)]
  expected = [(job, k, path) for job, k in both for path in ("plain", "fast")]
  expected.insert(-2, ("vae", None, "-"))
  assert [(row["job"], row["num_tokens"], row["path"]) for row in rows] == expected
  for row in rows:
    assert all(row[name] > 0 and math.isfinite(row[name]) for name in NUMBERS), row
    assert len(row["seconds"]) == 2 and row["batch_size"] == 2 and row["latents"] and row["platform"] == "cpu"
    assert row["images_per_second_min"] <= row["images_per_second"] <= row["images_per_second_max"]
    assert row["mfu"] == pytest.approx(row["flops"] * row["images_per_second"] / 2 / 1e9)
    assert row["device_peak_bytes"] is None and row["attention"] == "xla" and row["dtype"] == "float32"
    assert row["precision"] == (None if row["job"] == "train" else "highest")
  by_name = {(row["job"], row["num_tokens"], row["path"]): row for row in rows}
  assert by_name["detokenize", 1, "fast"]["flops"] < by_name["detokenize", 1, "plain"]["flops"]
  assert by_name["tokenize", 16, "fast"]["flops"] == by_name["tokenize", 1, "plain"]["flops"]
  assert [(ratio["job"], ratio["num_tokens"]) for ratio in ratios] == both
  assert all(0 < r["min"] <= r["max"] and r["times_as_fast"] > 0 and r["rounds"] == 2 for r in ratios)
  assert [r["same_program"] for r in ratios] == [False, True, False, False, False]
  assert {(peak["dtype"], peak["precision"]) for peak in peaks} == {("float32", None), ("float32", "highest")}
  assert all(peak["flops_per_second"] == [1e9, 1e9] for peak in peaks)
  assert not spans and all(row["ms_per_token"] is None and not row["shorter"] for row in rows)
  printed = capsys.readouterr().out
  table = printed.split("\n\n")[1].splitlines()
  assert [line.split()[0] for line in table[1:12]] == [row["job"] for row in rows]
  assert sum("fast is" in line for line in table) == 5 and "MFU" in table[0] and "peak of matrix products" in printed


def test_images_with_one_path_and_another_dtype(tmp_path):
  out = tmp_path / "rows.jsonl"
  given = (f"--config={config_file(tmp_path)}", "--repeats=1", "--batch_size=2", "--paths=fast", f"--out={out}")
  run(benchmark, *given, "--jobs=detokenize,tokenize", "--num_tokens=8", "--nolatents", "--dtype=bfloat16")
  rows, ratios, *_ = read(out)
  assert [row["job"] for row in rows] == ["tokenize", "detokenize"] and not ratios
  assert all(row["dtype"] == "bfloat16" and row["precision"] is None and not row["latents"] for row in rows)
  run(benchmark, *given, "--jobs=tokenize", "--num_tokens=8")
  (row,), *_ = read(out)  # overwritten
  assert row["latents"] and row["flops"] < rows[0]["flops"]  # without the VAE


def test_models_without_vae_or_tokens(tmp_path):
  out = tmp_path / "rows.jsonl"
  pixels = f"--config={ROOT / 'configs' / 'debug.py'}"
  assert run_jobs.jobs_of(debug.get_config()) == ("tokenize", "detokenize", "train")
  run(benchmark, pixels, "--jobs=tokenize", "--repeats=9", "--seconds=0", f"--out={out}", "--paths=plain")
  rows = read(out)[0]
  assert [row["num_tokens"] for row in rows] == [1, 4] and all(len(row["seconds"]) == 1 for row in rows)
  vae = f"--config={config_file(tmp_path, stage='vae')}"
  run(benchmark, vae, "--jobs=vae", "--repeats=1", "--batch_size=2", f"--out={out}")
  assert [(row["job"], row["path"]) for row in read(out)[0]] == [("vae", "-")]
  fails(
    "no job 'tokenize' with stage 'vae', vae.kind 'autoencoder_kl', only vae, train", benchmark, vae, "--jobs=tokenize"
  )
  fails("no job 'vae' with .*'pixels', only tokenize, detokenize, train", benchmark, pixels, "--jobs=vae")


def test_paths_agree_and_training_is_the_run_update(tmp_path):
  """Both paths compute the same from the same arguments, and no result is trivially zero."""
  values = flags.FlagValues()
  benchmark.define_flags(values)
  values(["benchmark", f"--config={config_file(tmp_path)}"])
  bench = benchmark_jobs.TokenizerBenchmark(values.config, benchmark.PATHS, 2, True)
  for job, k in (("tokenize", 4), ("detokenize", 4)):
    args, made = bench.prepare(job, k)
    assert all(np.any(x) for x in jax.tree.leaves(args[0]))
    plain, fast = (jax.jit(fn)(*args) for fn, _ in made.values())
    assert np.std(plain) > 0
    np.testing.assert_allclose(plain[:, :4], fast[:, :4], atol=1e-4)
  (state, batch, key), made = bench.prepare("train", None)
  copies = lambda tree: jax.tree.map(jnp.copy, tree)  # the state is donated
  compiler = timing.Compiler()
  programs = [compiler(fn, (state, batch, key), donated=True).run for fn, _ in made.values()]
  ends = [program(copies(state), batch, key) for program in programs]
  assert all(int(end.step) == 1 and "vae" not in end.params and not end.frozen for end, _ in ends)
  losses = [metrics["loss"].compute() for _, metrics in ends]
  np.testing.assert_allclose(*losses, rtol=1e-4)


def test_results_compared_with_the_plain_path(tmp_path, capsys, monkeypatch):
  out = tmp_path / "results" / "here.jsonl"
  given = f"--config={config_file(tmp_path)}", "--parity", "--num_tokens=2", "--batch_size=2"
  run(benchmark, *given, "--jobs=tokenize,detokenize", f"--out={out}")
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  both = [(job, path) for job in ("tokenize", "detokenize") for path in ("plain", "fast")]
  assert [(row["job"], row["path"]) for row in rows] == both
  assert all(row["passed"] and row["error"] <= 1e-5 for row in rows)
  capsys.readouterr()
  run(benchmark, f"--table={out.parent}")
  table = capsys.readouterr().out
  assert table.count("| cpu | here |") == 4 and table.count("| passed |") == 4 and "0% of ids differ" in table

  weights = nested.key_log_counts  # without them, merged registers count once
  monkeypatch.setattr(nested, "key_log_counts", lambda *args, **kwargs: 0 * weights(*args, **kwargs))
  fails(
    "the results of detokenize differ from those of the CPU", benchmark, *given, "--jobs=detokenize", f"--out={out}"
  )
  assert "FAILED: detokenize k=2, fast, float32, xla: largest error" in capsys.readouterr().out
  fails("no results \\(.jsonl\\) in", benchmark, f"--table={tmp_path}")
  (tmp_path / "other.jsonl").write_text("[]")
  fails("other.jsonl has no results of flextok_jax.benchmark", benchmark, f"--table={tmp_path}")


def test_generator(tmp_path, capsys):
  """Each range of tokens has its cost; the untimed round draws one token."""
  out = tmp_path / "rows.jsonl"
  given = f"--config={config_file(tmp_path, **GENERATOR)}"
  run(benchmark, given, "--num_tokens=40", "--repeats=2", "--batch_size=2", f"--out={out}")
  (plain, fast, train), (ratio,), _, spans = read(out)
  assert [(row["job"], row["path"], row["num_tokens"]) for row in (plain, fast, train)] == [
    ("ar", "plain", 40),
    ("ar", "fast", 40),
    ("train", "-", None),
  ]
  assert all(row[name] > 0 for row in (plain, fast, train) for name in NUMBERS) and ratio["times_as_fast"] > 0
  for row in (plain, fast):
    assert row["ms_per_token"] == pytest.approx(1e3 * np.median(row["seconds"]) / 40) and row["precision"] == "highest"
  assert train["ms_per_token"] is None and train["token_bytes"] is None and plain["token_bytes"] is None
  assert fast["token_bytes"] > 0 and sorted(map(int, fast["shorter"])) == [1, 10, 20, 30] and not plain["shorter"]
  assert [(s["path"], s["from"], s["to"]) for s in spans] == [
    ("fast", low, high) for low, high in ((1, 10), (10, 20), (20, 30), (30, 40))
  ]
  calls = {**fast["shorter"], "40": fast["seconds"]}
  for span in spans:
    pairs = zip(calls[str(span["from"])], calls[str(span["to"])])
    each = [1e3 * (b - a) / (span["to"] - span["from"]) for a, b in pairs]
    assert span["rounds"] == 2 and min(each) <= span["ms_per_token"] <= max(each)
  printed = capsys.readouterr().out
  assert "ar k=40, plain: " in printed and " from 30 to 40); each reads " in printed
  fails("no job 'tokenize' with stage 'ar', only ar, train", benchmark, given, "--jobs=tokenize")
  fails("num_tokens=41 is out of range: this model takes 1 to 40", benchmark, given, "--num_tokens=41")


@pytest.mark.parametrize("condition", ["class", "text"])
def test_generator_paths_agree(condition, tmp_path):
  """Both draw the same tokens, beyond one chunk of the plain path; fewer tokens need no recompilation."""
  values = flags.FlagValues()
  benchmark.define_flags(values)
  config = config_file(tmp_path, **{**GENERATOR, "ar": dict(GENERATOR["ar"], condition=condition)})
  values(["benchmark", f"--config={config}"])
  bench = benchmark_ar.GeneratorBenchmark(values.config, benchmark.PATHS, 2, True)
  args, made = bench.prepare("ar", 40)
  parts = {"ar", "text_mlp", "text"} if condition == "text" else {"ar"}
  assert all(np.any(x) for x in jax.tree.leaves(args[0])) and set(args[0]) == parts
  programs = {path: timing.Compiler()(fn, args).run for path, (fn, _) in made.items()}
  plain, fast = (program(*args) for program in programs.values())
  np.testing.assert_array_equal(plain[0], fast[0])
  np.testing.assert_allclose(plain[1], fast[1], atol=1e-4)
  assert len(np.unique(plain[0])) > 10
  fewer = programs["fast"](*args[:5], jnp.int32(7), *args[6:])[0]
  np.testing.assert_array_equal(fewer[:, :7], fast[0][:, :7])
  assert (np.asarray(fewer[:, 7:]) == 60).all()
  (state, batch, key), made = bench.prepare("train", None)
  ((update, _),) = made.values()
  end, metrics = jax.eval_shape(update, state, batch, key)
  assert set(end.params) == parts and not end.frozen and "loss" in metrics


def test_rounds_and_peak():
  calls = []
  programs = {name: lambda x, name=name: (calls.append((name, int(x))), x + 1)[1:] for name in "ab"}
  seconds = timing.time_rounds(programs, (jnp.int32(0),), repeats=2, carried=True)
  assert calls == [("a", 0), ("b", 1), ("b", 2), ("a", 3), ("a", 4), ("b", 5)]
  assert all(len(times) == 2 and min(times) >= 0 for times in seconds.values())
  assert 1e8 < matmul_peak("float32", "highest", repeats=1) < 1e15
  calls.clear()
  timing.time_rounds(programs, (jnp.int32(0),), repeats=1, warm_up={"a": programs["a"]})
  assert [name for name, _ in calls] == ["a", "b", "a"]
  limited = timing.time_rounds(programs, (jnp.int32(0),), repeats=5, limit=0.0)
  assert all(len(times) == 1 for times in limited.values())


def test_bad_input_is_refused(tmp_path):
  given = f"--config={config_file(tmp_path)}"
  fails("give --config=NAME", benchmark)
  fails("--jobs: unknown 'dance', one of tokenize, detokenize, vae, ar, train", benchmark, given, "--jobs=train,dance")
  fails("--paths: unknown 'slow', one of plain, fast", benchmark, given, "--paths=slow")
  fails("--paths is empty", benchmark, given, "--paths=")
  fails("num_tokens=17 is out of range: this model takes 1 to 16", benchmark, given, "--num_tokens=1,17")
  fails("num_tokens=0 is out of range", benchmark, given, "--num_tokens=0")
  fails("--num_tokens takes whole numbers separated by commas, got 'many'", benchmark, given, "--num_tokens=many")
  fails("--seconds=nan must be a finite number", benchmark, given, "--seconds=nan")
  fails("dtype must be one of float32, bfloat16, .*'int8'", benchmark, given, "--dtype=int8")
  fails("--out=.* is a folder: give a file", benchmark, given, f"--out={tmp_path}")
  for flag in ("repeats=0", "batch_size=-1", "seconds=-1"):
    fails(f"--{flag}", benchmark, given, f"--{flag}")
  fails(
    "batch_size=3 is not a multiple of optim.accumulate_steps 2",
    benchmark,
    f"--config={config_file(tmp_path, optim=dict(accumulate_steps=2))}",
    "--batch_size=3",
  )
  (tmp_path / "file").write_text("")
  fails(
    "cannot write .*file: .*is a file",
    benchmark,
    given,
    "--jobs=tokenize",
    "--num_tokens=1",
    "--repeats=1",
    f"--out={tmp_path / 'file' / 'x'}",
  )


def test_command_as_a_user_process(tmp_path):
  done = shell("flextok_jax.benchmark", f"--config={config_file(tmp_path)}", "--repeats=0")
  assert done == (1, "", "error: flag --repeats=0: 0 is not a positive integer\n")
