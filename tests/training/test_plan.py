"""The choice of a mesh: every config on the machines that docs/scaling.md names, and the estimate against compilers."""

from ast import literal_eval
import functools
import re
import types

import jax
import pytest

from flextok_jax.config import read_config, with_fields
from flextok_jax.configs import debug
from flextok_jax.core import accelerators
from flextok_jax.parallel import sharding
from flextok_jax.training import loop, plan
from tests.conftest import ROOT
from tests.support.configs import SPECS, parse

FAMILIES = ("flextok", "ar", "vae", "distill", "finetune")
LARGE = [spec for spec in SPECS if spec.split(":")[0] in FAMILIES and not spec.endswith((":glyphs", ":shapes"))]


def machine(kind, count, platform="tpu", **fields):
  """Returns the devices of a machine that is only described."""
  fields = dict(device_kind=kind, platform=platform, memory_stats=lambda: None) | fields
  return [types.SimpleNamespace(**fields)] * count


MACHINES = {
  "v5e:16x16": machine("TPU v5 lite", 256),
  "v5p:4x4x4": machine("TPU v5", 64, num_cores=2),
  "v6e:16x16": machine("TPU v6 lite", 256),
  "8 x H100 80 GB": machine("NVIDIA H100 80GB HBM3", 8, "gpu", compute_capability="9.0"),
}
TPU7X = machine("TPU7x", 16)


@pytest.fixture(scope="module", autouse=True)
def states_traced_once():
  """Configs whose states have the same shapes share them."""
  trace, states = plan._abstract_state, {}

  def abstract_state(config):
    other = ("data", "eval", "sampler", "mesh", "remat", "attention", "optim")
    fields = {name: value for name, value in config.to_dict().items() if name not in other}
    key = repr(fields | {"train": config.train.parts, "init_from": ""})
    if key not in states:
      states[key] = trace(config)
    return states[key]

  patch = pytest.MonkeyPatch()
  patch.setattr(plan, "_abstract_state", abstract_state)
  yield
  patch.undo()


@functools.cache
def table():
  """Returns {config: its row} of the table of chosen meshes in the documentation."""
  text = (ROOT / "docs" / "scaling.md").read_text()
  header, _, *rows = text.partition(f"| fsdp of | {' | '.join(MACHINES)} |")[2].partition("\n\n")[0].splitlines()
  cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
  return {spec: row[1:] for row in cells for spec in row[0].split(", ")}


@pytest.mark.parametrize("spec", LARGE)
def test_configs_fit_without_further_flags(spec):
  config = parse(spec)
  row = []
  for devices in MACHINES.values():
    chosen = plan.choose(config, devices)
    assert not chosen.problem
    used, memory = map(float, re.search(r"about ([\d.]+) GB .* of ([\d.]+) GB", chosen.text).groups())
    assert used <= 0.82 * memory
    sizes = sharding.axis_sizes(*(chosen.axes[axis] for axis in sharding.AXES), len(devices))
    assert sizes[0] * sizes[1] == len(devices) and sizes[2] == 1
    row.append(("-" if sizes[1] == 1 else str(sizes[1])) + " z" * chosen.shard_update)
  assert row == table()[spec]


def fixed(spec, rows, devices, fsdp, remat, **fields):
  """Returns (config, devices) of a row of the reports in docs/scaling.md, which have XLA's attention."""
  fields |= {
    "attention": "xla",
    "data.global_batch": rows * len(devices),
    "mesh.fsdp": fsdp,
    "mesh.shard_update": "off",
    "remat": remat,
  }
  fields |= {"data.latents": "DIR", "repa.weight": 0.0} if spec.startswith("flextok") else {}
  fields |= {"data.trajectories": "DIR"} if spec.startswith("distill") else {}
  return with_fields(parse(spec), fields), devices


REPORTS = [  # a row of the reports, the compiler's GB, and between which ratios to it the estimate lies
  (("flextok:d18_d28_in1k", 32, MACHINES["v5e:16x16"], 128, "full"), 7.6, (1, 1.3)),
  (("flextok:d18_d28_in1k", 16, MACHINES["v5e:16x16"], 128, "dots"), 11.6, (1, 1.3)),
  (("finetune:d18_d28_dfn", 8, machine("TPU v5 lite", 8), 8, "full"), 10.4, (1, 1.3)),
  (("distill:d12_d12", 16, MACHINES["v5p:4x4x4"], 1, "dots"), 10.5, (1, 1.3)),
  (("ar:1b3", 48, MACHINES["v5e:16x16"], 128, "dots"), 16.4, (1, 1.3)),
  (("ar:1b3", 128, MACHINES["v5p:4x4x4"], 64, "dots"), 45.1, (1, 1.3)),
  (("ar:1b3", 64, MACHINES["v6e:16x16"], 128, "dots"), 22.1, (1, 1.3)),
  (("ar:1b3", 64, TPU7X, 1, "dots"), 55.6, (1, 1.3)),
  (("ar:3b", 16, MACHINES["v5e:16x16"], 128, "dots"), 11.2, (1, 1.3)),
  (("ar:3b", 64, MACHINES["v5p:4x4x4"], 64, "dots"), 42.6, (1, 1.3)),
  (("ar:3b", 32, MACHINES["v6e:16x16"], 128, "dots"), 20.6, (1, 1.3)),
  (("ar:3b", 32, TPU7X, 4, "dots"), 40.6, (0.99, 1.3)),
]


@pytest.mark.parametrize("row, compiled, ratios", REPORTS)
def test_estimates_are_near_the_compilers_count(row, compiled, ratios):
  text = plan.choose(*fixed(*row)).text
  estimate = float(re.search(r"about ([\d.]+) GB", text)[1])
  assert ratios[0] <= estimate / compiled <= ratios[1], text


def test_a_given_mesh_is_kept():
  devices = MACHINES["v5e:16x16"]
  config = parse("ar:49m")
  assert plan.choose(config, devices).axes == dict(data=-1, fsdp=1, tensor=1, slices=1)
  for mesh in (dict(fsdp=16), dict(data=4, fsdp=-1), dict(data=-1, fsdp=8, tensor=2), dict(fsdp=4, slices=2)):
    config = parse("ar:49m", *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()))
    assert plan.choose(config, devices).axes == dict(data=-1, fsdp=0, tensor=1, slices=1) | mesh
  config = parse("ar:49m", "--config.mesh.data=64")  # fsdp: the rest
  assert plan.choose(config, devices).text.startswith("data 64, fsdp 4, tensor 1: about")
  with pytest.raises(ValueError, match="a mesh of data=-1, fsdp=3, tensor=1 does not match the 256 devices"):
    plan.choose(parse("ar:49m", "--config.mesh.fsdp=3"), devices)


def test_the_update_is_sharded_over_data_only_where_needed():
  devices = MACHINES["v6e:16x16"]
  choose = lambda *fields: plan.choose(parse("ar:1b3", *fields), devices)
  state = lambda chosen: float(re.search(r"state ([\d.]+)", chosen.text)[1])
  auto, off = choose(), choose("--config.mesh.shard_update=off")
  assert auto.shard_update and auto.axes["fsdp"] == 1 and "update sharded over data" in auto.text
  assert not off.shard_update and off.axes["fsdp"] == 2
  parameters = 4 * 1.575  # GB; two moments and the average have as much
  assert state(off) == pytest.approx(parameters * 4 / 2, abs=0.1)
  on = plan.choose(parse("ar:1b3", "--config.mesh.shard_update=on"), MACHINES["v5p:4x4x4"])
  assert on.axes["fsdp"] == 1 and state(on) == pytest.approx(parameters * (1 + 3 / 64), abs=0.1)
  assert parameters < state(auto) < state(off)  # not all dimensions are divisible by 256
  assert not plan.choose(parse("ar:49m"), devices).shard_update
  assert plan.choose(parse("ar:49m", "--config.mesh.shard_update=on"), devices).shard_update
  assert not plan.choose(parse("ar:49m", "--config.mesh.shard_update=on", "--config.mesh.data=1"), devices).shard_update


@pytest.mark.parametrize(
  "spec, fields, machine, rows",
  [
    ("flextok:d18_d28_in1k", {}, "v5e:16x16", 4),
    ("flextok:d18_d28_in1k", {"optim.accumulate_steps": 2}, "v5p:4x4x4", 8),
    ("flextok:d18_d28_in1k", {"data.global_batch": 96}, "8 x H100 80 GB", 12),
    ("flextok:d18_d28_in1k", {}, "v5p:4x4x4", None),  # 16 rows
    ("flextok:d18_d28_in1k", {"tokens.bucket_rows": 2}, "v5e:16x16", None),
    ("flextok:d18_d28_in1k", {"fast": False}, "v5e:16x16", None),  # one bucket
    ("finetune:d18_d28_dfn", {}, "8 x H100 80 GB", None),
    ("ar:49m", {}, "v5e:16x16", None),
  ],
)
def test_groups_that_devices_share(spec, fields, machine, rows):
  """The setting that it names leaves whole groups to each device."""
  config = with_fields(parse(spec), fields)
  text = plan.choose(config, MACHINES[machine]).advice
  assert text.endswith(f"with tokens.bucket_rows={rows} they divide") if rows else not text
  if rows:
    assert not plan.choose(with_fields(config, {"tokens.bucket_rows": rows}), MACHINES[machine]).advice


def test_slices_are_divided_by_whole_copies():
  """fsdp stays within a slice; without slices it would be 4."""
  axes = plan.choose(parse("flextok:d18_d28_in1k", "--config.mesh.slices=128"), MACHINES["v5e:16x16"]).axes
  assert axes == dict(data=-1, fsdp=2, tensor=1, slices=128)


def test_on_devices_of_unknown_memory_only_the_batch_is_divided():
  config = debug.get_config()
  assert plan.choose(config, jax.devices()).axes == dict(data=-1, fsdp=1, tensor=1, slices=1)
  assert plan.choose(config, jax.devices()).text == "data 8, fsdp 1, tensor 1"


def test_too_large_runs_name_the_nearest_settings_that_fit():
  devices = MACHINES["v5e:16x16"]
  too_large = plan.choose(
    parse("flextok:d18_d28_in1k", "--config.mesh.fsdp=1", "--config.mesh.shard_update=off"), devices
  )
  assert too_large.impossible
  assert re.search(r"of 17.2 GB: set mesh.data=-1 and mesh.fsdp=16$", too_large.problem)
  assert "\n" not in too_large.problem

  devices, config = MACHINES["8 x H100 80 GB"], with_fields(parse("ar:393m"), {"remat": "none"})
  for batch, words in ((1024, r"remat='dots'"), (32768, r"remat='full' and optim.accumulate_steps=\d+")):
    config = with_fields(config, {"data.global_batch": batch})
    expected = plan.choose(config, devices)
    assert not expected.impossible
    remedy = re.search(f": set ({words})$", expected.problem)[1]
    followed = with_fields(config, {k: literal_eval(v) for k, v in (x.split("=") for x in remedy.split(" and "))})
    assert not plan.choose(followed, devices).problem
  given = with_fields(parse("ar:1b3"), {"remat": "none", "mesh.fsdp": 8, "data.global_batch": 2048})
  assert plan.choose(given, devices).problem.endswith(": set remat='full'")  # on the mesh that was given
  least = plan.choose(config, devices, memory=1e8)
  assert least.impossible and least.problem.endswith("use more devices, or a smaller data.global_batch")


def test_memory_is_what_jax_has_reserved():
  (device,) = machine("NVIDIA H100 80GB HBM3", 1, "gpu")
  assert accelerators.memory(device) == 80e9
  (device,) = machine("NVIDIA H100 80GB HBM3", 1, "gpu", memory_stats=lambda: {"bytes_limit": 60e9})
  assert accelerators.memory(device) == 60e9
  (device,) = machine("a new kind", 1, "gpu")
  assert accelerators.memory(device) is None and accelerators.memory(jax.devices()[0]) is None


class NoEvaluation:
  scalars: dict = {}
  run = lambda self, params: self
  write = lambda self, folder: []
  table = lambda self: ""


def test_runs_record_the_mesh_and_choose_again(tmp_path, monkeypatch, capfd):
  """Stopped on eight devices that need fsdp, resumed on two that do not; and refused where the state does not fit."""
  train = functools.partial(loop.train, make_evaluation=lambda *args: (NoEvaluation(), lambda params: {}))
  monkeypatch.setattr(sharding, "SMALL", 1024)  # otherwise nothing this small would be sharded
  monkeypatch.setattr(accelerators, "memory", lambda device: 2e6)
  config = debug.get_config()
  config.update(train=dict(num_steps=2, log_every=1, checkpoint_every=1))
  train(config, str(tmp_path / "run"))
  first = read_config(tmp_path / "run").mesh.chosen
  out = capfd.readouterr().out
  assert re.match(r"data [124], fsdp [248], tensor 1: about 0.0 GB", first) and first in out
  assert "warning: each device has 1 row, but they run in groups of 8" in out

  two = jax.devices()[:2]
  monkeypatch.setattr(jax, "devices", lambda *args: two)
  monkeypatch.setattr(accelerators, "memory", lambda device: None)
  resumed = read_config(tmp_path / "run")
  resumed.train.num_steps = 3
  train(resumed, str(tmp_path / "run"))
  assert read_config(tmp_path / "run").mesh.chosen == "data 2, fsdp 1, tensor 1"
  assert "resuming from step 2" in capfd.readouterr().out

  monkeypatch.setattr(accelerators, "memory", lambda device: 1e5)
  with pytest.raises(ValueError, match="out of memory expected with the mesh data 2, fsdp 1"):
    train(with_fields(config, {"mesh.fsdp": 1}), str(tmp_path / "refused"))
  assert not (tmp_path / "refused").exists()
