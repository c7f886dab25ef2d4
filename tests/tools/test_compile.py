"""The compile command: reports of small programs against counts by hand, its search, and its errors."""

import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys
import types

import jax
from jax.experimental import topologies
import pytest

from flextok_jax import compile
from flextok_jax import config as common
from flextok_jax.configs import debug
from flextok_jax.core import accelerators
from flextok_jax.parallel import sharding
from flextok_jax.tools.compile import jobs as compile_jobs
from flextok_jax.tools.compile import profile
from flextok_jax.tools.compile import report as compile_report
from flextok_jax.tools.compile import run as compile_run
from flextok_jax.tools.compile import search as compile_search
from tests.support import analytic_flops as flops
from tests.support import analytic_flops_ar as flops_ar
from tests.support.commands import run

ROOT = Path(__file__).parents[2]
CHIP = accelerators.Accelerator(flops=1e12, memory=1e9, bandwidth=1e11, links=1e10, axes=2)


def generator(**overrides):
  c = common.derive(
    stage="ar",
    dtype="float32",
    data=dict(global_batch=16),
    ar=dict(width=32, depth=2, head_dim=16, num_ids=100, num_tokens=8, num_classes=5, loss_chunk=8),
  )
  c.update(overrides)
  return c


def mesh_of(**axes):
  return sharding.make_mesh(**axes)


def compiled(config, job, mesh, batch, shard_update=False):
  made = compile_jobs.make_job(config, job, mesh, batch, None, shard_update)
  program = made.lower().compile()
  settings = dict(
    config="tiny",
    job=job,
    topology="cpu",
    devices=mesh.size,
    kind="cpu",
    mesh=dict(mesh.shape),
    per_device_batch=batch,
    global_batch=made.batch,
    remat=config.remat,
    attention="xla",
  )
  report = compile_report.make_report(settings, made, program, program.as_text(), CHIP, mesh)
  return made, program, report


def parameters(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def train():
  """Compiles a tiny generator's update for 8 devices."""
  return compiled(generator(), "train", mesh_of(data=8), 8)


def test_memory_adds_up(train):
  job, program, report = train
  count, stats = parameters(job.args[0].params), program.memory_analysis()
  m = report.memory
  assert m["parameters"] == m["EMA"] == 4 * count
  assert 2 * m["parameters"] <= m["optimizer"] <= 2 * m["parameters"] + 64  # two moments and counters
  assert m["batch"] == 8 * 4 * (8 + 3)  # token ids; label, length and unreadable flag
  assert "frozen" not in m
  assert m["padding"] >= 0
  # A donated buffer is both argument and output, and is stored once.
  assert m["outputs"] < 2000  # the metrics
  assert stats.alias_size_in_bytes >= 4 * 4 * count
  assert m["total"] == sum(size for name, size in m.items() if name not in ("total", "limit"))
  assert m["total"] == (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
    - stats.alias_size_in_bytes
  )
  assert report.fits == (m["total"] <= 1e9)


def test_flops_match_the_benchmark_and_the_program(train):
  job, _, report = train
  assert job.flops == job.model_flops == flops_ar.ar_train(generator(), 64)
  assert report.flops["analytic"] == job.flops / 8
  again = 2 * 8 * 8 * 32 * 100  # recomputing the readout, which a single chunk of positions does not need
  assert report.flops["compiled"] == pytest.approx(report.flops["analytic"] - again, rel=1e-3)


def test_gradients_are_communicated_once(train):
  job, _, report = train
  reduced = {c["kind"]: c for c in report.collectives}["all-reduce"]
  assert reduced["group"] == 8
  gradients = 2 * 7 / 8 * 4 * parameters(job.args[0].params)
  assert gradients <= reduced["bytes"] <= gradients + 2000  # plus the metrics
  half = CHIP.links / 2  # these devices form a line, while CHIP's links go along two axes
  assert report.seconds["interconnect"] == pytest.approx(sum(c["bytes"] for c in report.collectives) / half)


def test_estimates_follow_from_the_resources(train):
  report = train[2]
  assert report.seconds["compute"] == pytest.approx(report.flops["analytic"] / CHIP.flops)
  longest = max(report.seconds.values())
  assert report.step_seconds == longest == report.seconds[report.bound]  # CPU compilers report no cycles
  assert report.mfu == report.mfu_roofline == pytest.approx(report.flops["model"] / CHIP.flops / longest)
  assert report.images_per_second == pytest.approx(64 / longest)
  slow = dataclasses.replace(report, seconds=report.seconds | {"schedule": 2 * longest})
  assert slow.bound == report.bound
  assert slow.mfu == pytest.approx(report.mfu / 2)
  assert slow.mfu_roofline == report.mfu_roofline


def test_report_as_table_and_json(train):
  report = train[2]
  text = compile_report.format_report(report)
  for name in (*report.memory, "all-reduce", "roofline", "estimate", *report.seconds):
    assert name in text or name == "limit"
  again = json.loads(json.dumps(report.to_json()))
  assert again["mfu"] == report.mfu
  assert again["memory"] == report.memory
  assert report.kinds == [] and "cycles" not in text  # CPU compilers report no cycles
  header, _, row = compile_report.markdown([again]).splitlines()
  assert header.count("|") == row.count("|")
  assert "8 x 1 x 1" in row


def test_kinds_of_kernels_as_table_and_json(train):
  """Shares of the cycles add up to one; the products' FLOPs are relative to the peak in these cycles."""
  kinds = [
    {"kind": profile.PRODUCTS, "runs": 3, "cycles": 300, "flops": 1000, "peak": 2000.0},
    {"kind": profile.MOVES, "runs": 9, "cycles": 100, "flops": 0, "peak": 700.0},
  ]
  longest = [dataclasses.asdict(profile.Kernel(profile.PRODUCTS, "jit(update)/dot_general", 3, 300, 1000))]
  report = dataclasses.replace(train[2], kinds=kinds, kernels=longest)
  lines = [" ".join(line.split()) for line in compile_report.format_report(report, longest=True).splitlines()]
  assert "products with weights 75.0% 3 50%" in lines
  assert "copies and layout changes 25.0% 9 0%" in lines
  assert "75.0% 3 jit(update)/dot_general" in lines
  assert "jit(update)/dot_general" not in compile_report.format_report(report)
  table = compile_report.markdown_kinds([json.loads(json.dumps(made.to_json())) for made in (report, train[2])])
  assert table.splitlines()[0].count("|") == 3  # that of a CPU has no cycles
  assert table.splitlines()[2:] == ["| products with weights | 75.0% (50%) |", "| copies and layout changes | 25.0% |"]


def test_rematerialisation_does_not_count_as_model_flops():
  config = debug.get_config()
  config.remat = "full"
  job = compile_jobs.make_job(config, "train", mesh_of(data=8), 8, None)
  assert job.flops == pytest.approx(flops.train(config, 64, True), rel=5e-5)
  config.remat = "none"
  assert job.model_flops == pytest.approx(flops.train(config, 64, True), rel=5e-5)
  assert job.model_flops < job.flops


def test_fsdp_shards_and_gathers_the_state():
  config = generator(ar=dict(width=128, num_ids=4096))
  made, _, report = compiled(config, "train", mesh_of(data=2, fsdp=4), 2)
  whole = 4 * parameters(made.args[0].params)
  assert report.memory["parameters"] < whole / 2
  assert report.memory["optimizer"] == pytest.approx(2 * report.memory["parameters"], rel=0.01)
  kinds = {c["kind"] for c in report.collectives if c["group"] == 4}
  assert "all-gather" in kinds
  assert made.flops == flops_ar.ar_train(config, 16)


def test_sharded_updates_gather_the_parameters_once(monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 1024)  # nothing here is larger than the usual one
  config = generator(ar=dict(width=64, num_ids=512))
  made, _, report = compiled(config, "train", mesh_of(data=8), 2, shard_update=True)
  whole = 4 * parameters(made.args[0].params)
  assert report.memory["parameters"] == whole
  assert report.memory["optimizer"] < 1.1 * 2 * whole / 8 and report.memory["EMA"] < 1.1 * whole / 8
  gathered = sum(c["bytes"] for c in report.collectives if c["kind"] == "all-gather")
  assert 0.9 * whole <= gathered * 8 / 7 <= 1.1 * whole


def test_generation_counts_all_tokens():
  config = generator()
  made, _, report = compiled(config, "ar", mesh_of(data=8), 2)
  assert made.flops == flops_ar.ar_generate(config, 8, 16, True, True)
  assert report.flops["compiled"] == pytest.approx(report.flops["analytic"], rel=0.05)
  assert any("loop" in note for note in report.notes)
  assert report.memory["parameters"] == 4 * parameters(made.args[0])


def test_sampling_counts_all_steps():
  config = debug.get_config()
  made, _, report = compiled(config, "sample", mesh_of(data=8), 2)
  assert made.flops == flops.sampler(config, 4, 16, True)
  assert report.flops["compiled"] == pytest.approx(report.flops["analytic"], rel=0.05)


@pytest.mark.parametrize("condition", ["text", "class"])
@pytest.mark.parametrize("encoder", ["t5", "bytes"])
def test_generators_of_all_conditions_are_traced(condition, encoder):
  config = generator(
    ar=dict(condition=condition),
    text=dict(encoder=encoder, max_length=6, features=16, mlp_hidden=8, depth=1, head_dim=16),
  )
  for job in ("train", "ar"):
    assert compile_jobs.make_job(config, job, mesh_of(data=8), 2, None).lower().out_info is not None


def device(kind, cores, **fields):
  return types.SimpleNamespace(device_kind=kind, num_cores=cores, **fields)


def test_kinds_of_devices():
  assert accelerators.known(jax.devices()[0]) is None
  assert accelerators.known(device("TPU v5 lite", 1)).flops == 197e12
  assert accelerators.known(device("TPU v5", 2)).flops == 459e12  # both cores form one device
  core, chip = accelerators.known(device("TPU7x", 1)), accelerators.known(device("TPU7x", 2))
  for name in ("flops", "memory", "bandwidth", "links"):  # one of two cores is a device
    assert getattr(core, name) == getattr(chip, name) / 2
  assert (core.clock, core.axes) == (chip.clock, chip.axes)
  assert accelerators.known(types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")).flops == 989e12
  for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
    chip = accelerators.known(device(kind, 2))
    assert 1e9 < chip.clock < 3e9
    assert 100 < chip.flops / chip.bandwidth < 700  # FLOPs in the time of one byte


def test_links_along_one_axis_are_a_fraction_of_all():
  corners = [device("x", 1, coords=[i % 2, i // 2, 0]) for i in range(4)]
  mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=corners))
  seconds = lambda *group: compile_report.link_seconds(
    compile_report.hlo_traffic.Collective("all-gather", 3, 10**9, group), CHIP, mesh
  )
  assert seconds(0, 1) == seconds(0, 2) == pytest.approx(3 * 1e9 / 5e9)
  assert seconds(0, 1, 2, 3) == pytest.approx(3 * 1e9 / 1e10)


def test_out_of_memory_gives_a_report(train):
  job = train[0]
  assert compile_report.arguments_fit(job, CHIP)
  small = dataclasses.replace(CHIP, memory=1e5)
  assert not compile_report.arguments_fit(job, small)
  report = compile_report.too_large({}, job, small)
  assert not report.fits
  assert report.memory["total"] > 1e5
  line = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (28.50G) exceeds available HBM (15.75G). HLO module: jit_update."
  )
  report = compile_report.too_large({}, job, CHIP, RuntimeError(line + "\nSee elsewhere"))
  assert report.memory["temporaries"] == int(28.5 * 2**30)
  assert report.memory["total"] == sum(size for name, size in report.memory.items() if name not in ("total", "limit"))
  assert report.notes == (line,)
  assert not compile_report.too_large({}, job, CHIP, RuntimeError("RESOURCE_EXHAUSTED: in other words")).fits


def tried(config, batch, seconds):
  settings = dict(mesh=config.mesh.to_dict(), remat=config.remat, per_device_batch=batch, global_batch=16 * batch)
  if seconds is None:
    return compile_report.CompileReport(settings, False, {"total": 2e9, "limit": 1e9})
  return compile_report.CompileReport(
    settings,
    True,
    {"total": 5e8, "limit": 1e9},
    {"model": 1.0, "peak": 1.0},
    seconds=dict.fromkeys(("compute", "memory", "interconnect"), seconds),
  )


def test_search_increases_the_batch_while_it_is_faster_and_fits():
  config = generator()

  def try_one(c, batch):
    if batch > (32 if c.remat == "full" else 8):
      return tried(c, batch, None)
    overhead, each = 1.0, {"none": 0.1, "dots": 0.12, "full": 0.14}[c.remat]
    return tried(c, batch, overhead + batch * each / c.mesh.tensor**0.01)

  reports = compile_search.search(config, "train", 16, 4, try_one)
  images = [r.images_per_second if r.fits else 0 for r in reports]
  assert images == sorted(images, reverse=True)
  best = reports[0].settings
  assert (best["remat"], best["per_device_batch"]) == ("full", 32)
  assert {r.settings["per_device_batch"] for r in reports if r.settings["remat"] == "none"} == {4, 8, 16}
  assert not any(r.fits and r.settings["per_device_batch"] == 16 and r.settings["remat"] == "none" for r in reports)
  lines = compile_search.format_search(reports).splitlines()
  assert len(lines) == len(reports)
  assert "does not fit" in lines[-1]


def test_search_tries_no_other_remat_without_gradients():
  reports = compile_search.search(generator(), "ar", 4, 4, lambda c, batch: tried(c, batch, float(batch)))
  assert {r.settings["remat"] for r in reports} == {"none"}


@pytest.mark.parametrize("devices", [1, 4, 16, 64, 256])
def test_meshes_of_the_search(devices):
  found = list(compile_search.meshes(generator(), devices))  # 2 heads, 128 hidden units
  assert all(m["data"] * m["fsdp"] * m["tensor"] == devices for m in found)
  assert {m["tensor"] for m in found} == {size for size in (1, 2) if devices % size == 0}
  assert {"data": devices, "fsdp": 1, "tensor": 1} in found
  assert {"data": 1, "fsdp": devices, "tensor": 1} in found
  assert len({tuple(m.values()) for m in found}) == len(found)
  assert {m["tensor"] for m in compile_search.meshes(debug.get_config(), devices)} == {1}  # 85 hidden units


CONFIG = f"--config={ROOT / 'configs' / 'debug.py'}"


@pytest.mark.parametrize(
  ("pattern", "args"),
  [
    ("give --config", ()),
    ("give --config", (CONFIG,)),
    ("unknown --job=fly: one of train, sample, ar", (CONFIG, "--topology=v5e:2x2", "--job=fly")),
  ],
)
def test_flags_are_checked_first(pattern, args):
  with pytest.raises(ValueError, match=pattern):
    run(compile, *args)


@pytest.mark.parametrize(
  ("error", "pattern"),
  [
    ("JAX TPU support not installed; cannot generate TPU topology.", r'pip install "flextok-jax\[tpu\]"'),
    ("INVALID_ARGUMENT: Invalid TPU external name: TPU v9", "topology=v9:1x1: INVALID_ARGUMENT.*known are v5e"),
  ],
)
def test_missing_compiler_and_unknown_topology_of_tpus(monkeypatch, error, pattern):
  def fail(*_):
    raise RuntimeError(error)

  monkeypatch.setattr(topologies, "get_topology_desc", fail)
  with pytest.raises(ValueError, match=pattern) as caught:
    run(compile, CONFIG, "--topology=v9:1x1")
  assert len(str(caught.value).splitlines()) == 1


def test_missing_compiler_and_unknown_topology_of_gpus(monkeypatch):
  def fail(*_, **options):
    assert options["topology"] == "1x1x16"
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(topologies, "get_topology_desc", fail)
  with pytest.raises(ValueError, match=r'GPU compiler is missing .*pip install "flextok-jax\[cuda\]"'):
    run(compile, CONFIG, "--topology=h100:16")
  for topology in ("h100", "h100:0", "h100:2x4"):
    with pytest.raises(ValueError, match=f"topology={topology}: give the number of GPUs, h100:8"):
      run(compile, CONFIG, f"--topology={topology}")


@pytest.mark.parametrize(
  ("config", "job", "batch", "tokens", "pattern"),
  [
    (generator(), "sample", 2, None, "stage 'ar' has no job 'sample', only train, ar"),
    (debug.get_config(), "ar", 2, None, "stage 'tokenizer' has no job 'ar', only train, sample"),
    (debug.get_config(), "train", 0, None, "per_device_batch=0 must be at least 1"),
    (debug.get_config(), "train", 2, 3, "num_tokens=3 must be None for the job 'train'"),
    (debug.get_config(), "sample", 2, 5, "num_tokens=5 is out of range: this model has 1 to 4 tokens"),
    (generator(data=dict(global_batch=12)), "train", None, None, "global_batch=12 is not divisible"),
  ],
)
def test_jobs_incompatible_with_the_config(config, job, batch, tokens, pattern):
  with pytest.raises(ValueError, match=pattern):
    compile_jobs.make_job(config, job, mesh_of(data=8), batch, tokens)


def test_devices_with_unknown_specifications_are_refused():
  with pytest.raises(ValueError, match="no figures of 'cpu'"):
    compile_run.compile_job(debug.get_config(), "debug", "train", "cpu", jax.devices(), 1, None)


def test_jobs_use_the_target_devices(monkeypatch):
  """Whether a kernel is supported depends on the target devices, not on those of this process."""

  def make_job(*args):
    raise ValueError(jax.config.jax_default_device)

  monkeypatch.setattr(compile_run, "make_job", make_job)
  monkeypatch.setattr(accelerators, "known", lambda device: True)
  with pytest.raises(ValueError) as caught:
    compile_run.compile_job(debug.get_config(), "debug", "train", "cpu", jax.devices()[5:6], 1, None)
  assert caught.value.args == (jax.devices()[5],)


def test_a_folder_without_reports_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="no reports"):
    run(compile, f"--table={tmp_path}")


@pytest.mark.parametrize(
  ("package", "topology", "kind"),
  [("libtpu", "v5e:2x2", "TPU v5 lite"), ("jax_plugins.xla_cuda12", "h100:4", "NVIDIA H100")],
)
def test_compile_for_absent_devices(tmp_path, package, topology, kind):
  pytest.importorskip(package, reason=f"the compiler {package} is not installed")
  command = [sys.executable, "-m", "flextok_jax.compile", CONFIG, f"--topology={topology}", f"--out={tmp_path}"]
  env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}
  done = subprocess.run(
    [*command, "--per_device_batch=16"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  (path,) = tmp_path.iterdir()
  assert path.name == f"debug.train.{topology.replace(':', '_')}.json"
  report = json.loads(path.read_text())
  assert report["settings"]["devices"] == 4 and report["settings"]["kind"].startswith(kind)
  assert report["fits"] and f"wrote {path}" in done.stdout
  assert {c["kind"] for c in report["collectives"]} >= {"all-reduce"}
  # The GPU's compiler writes small products as sums of elements or as larger products.
  assert report["flops"]["compiled"] == pytest.approx(
    report["flops"]["analytic"], rel=1e-3 if kind.startswith("TPU") else 0.1
  )
  assert ("schedule" in report["seconds"]) == kind.startswith("TPU")
