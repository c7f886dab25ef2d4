"""Where a run spends its time, measured with a fake clock; MFU; the profile of a few steps."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from flextok_jax import config as common
from flextok_jax.core import accelerators
from flextok_jax.training import goodput
from tests.support import analytic_flops as flops
from tests.support import analytic_flops_ar as flops_ar
from tests.support.configs import parse
from tests.support.runs import config_of


class Clock:
  """A clock that only advances when told to."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now

  def passes(self, seconds):
    self.now += seconds


@dataclasses.dataclass
class Computing:
  """An array that is ready, or not yet."""

  done: bool

  def is_ready(self):
    return self.done


@pytest.fixture
def clock():
  return Clock()


def seconds_of(time_spent, clock):
  """Seconds by kind, computed from the shares, without kinds that are zero."""
  shares = time_spent.shares()
  assert set(shares) == {f"time/{kind}" for kind in goodput.KINDS}
  seconds = {name.removeprefix("time/"): share * (clock.now - 100) for name, share in shares.items()}
  assert sum(shares.values()) == pytest.approx(1)
  return {kind: pytest.approx(value) for kind, value in seconds.items() if value}


def test_nested_time_counts_only_as_the_innermost_kind(clock):
  spent = goodput.Goodput(clock)
  clock.passes(3)
  with spent.spending("step"):
    clock.passes(5)
    with spent.spending("data"):
      clock.passes(1)
    with spent.spending("compile"):
      clock.passes(7)
    clock.passes(2)
    assert seconds_of(spent, clock) == {"other": 3, "step": 7, "data": 1, "compile": 7}
    with spent.spending("save"):
      clock.passes(4)
    with spent.spending("evaluate"):
      clock.passes(6)
  clock.passes(1)
  assert seconds_of(spent, clock) == {"other": 4, "step": 7, "data": 1, "compile": 7, "save": 4, "evaluate": 6}


def test_an_interrupted_wait_counts(clock):
  spent = goodput.Goodput(clock)
  with pytest.raises(StopIteration), spent.spending("step"), spent.spending("data"):
    clock.passes(2)
    raise StopIteration
  clock.passes(1)
  assert seconds_of(spent, clock) == {"data": 2, "other": 1}


def test_waiting_while_devices_compute_counts_as_stepping(clock):
  """The devices are busy, so no time is lost; otherwise all of it is waiting time."""
  spent = goodput.Goodput(clock)
  with spent.spending("data"):  # devices are idle
    clock.passes(1)
  with spent.spending("data", behind={"loss": Computing(False), "norm": Computing(True)}):
    clock.passes(2)
  with spent.spending("data", behind={"loss": Computing(True), "norm": Computing(True)}):
    clock.passes(4)
  with spent.spending("data", behind=jnp.zeros(3).block_until_ready()):
    clock.passes(8)
  assert seconds_of(spent, clock) == {"data": 13, "step": 2}


def test_shares_are_zero_at_the_start(clock):
  assert set(goodput.Goodput(clock).shares().values()) == {0.0}


def test_summary_line(clock):
  spent = goodput.Goodput(clock)
  for kind, seconds in (("step", 900), ("data", 70), ("save", 26), ("compile", 4)):
    with spent.spending(kind):
      clock.passes(seconds)
  assert goodput.summary(spent.shares()) == "step 90% data 7% save 3%"
  assert goodput.summary(spent.shares() | {"mfu": 0.4321}) == "MFU 43.2%  step 90% data 7% save 3%"
  assert goodput.summary({}) == ""


# MFU.


def test_mfu_covers_all_devices_and_ignores_remat():
  """MFU is 1 if a step takes the time that 4 devices at peak need for its analytic FLOPs."""
  devices = [types.SimpleNamespace(device_kind="TPU v5 lite", num_cores=1)] * 4
  peak = 4 * accelerators.known(devices[0]).flops
  config = common.derive(data=dict(global_batch=64), tokens=dict(num_registers=16), fast=False)  # less to trace
  step = (flops.train(config, 64, False) + flops.vae_encode(config, 64)) / peak
  for remat in ("none", "full"):
    config.remat = remat
    assert goodput.make_mfu(config, devices)(64 / step) == {"mfu": pytest.approx(1, rel=3e-6)}
    assert config.remat == remat
  assert goodput.update_flops(config) > 1.2 * flops.train(config, 64, False)
  assert goodput.make_mfu(config, jax.devices())(1.0) == {}  # the peak of a CPU is unknown


def test_flops_of_an_update():
  pixels = config_of(data=dict(global_batch=16), optim=dict(accumulate_steps=2))
  assert goodput.update_flops(pixels) == pytest.approx(2 * flops.train(pixels, 8, True), rel=3e-5)
  latents = common.derive(data=dict(global_batch=16, latents="somewhere"), tokens=dict(num_registers=16))
  assert goodput.update_flops(latents) == pytest.approx(flops.train(latents, 16, True), rel=3e-6)
  vae = common.derive(stage="vae", data=dict(global_batch=16), vae=dict(layers_per_block=1))
  assert goodput.update_flops(vae) == pytest.approx(flops.train_vae(vae, 16), rel=3e-6)
  generator = common.derive(stage="ar", data=dict(global_batch=16))
  assert goodput.update_flops(generator) == pytest.approx(flops_ar.ar_train(generator, 16), rel=3e-6)


# The profile.


@pytest.fixture
def calls(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
  monkeypatch.setattr(jax, "block_until_ready", lambda x: calls.append(("wait", x)))
  return calls


def profiled(steps, first, last, calls):
  """Returns the calls during a run of steps first..last, with each step as a call of its own."""
  profile = goodput.Profile(steps, "/runs/a/profile")
  for step in range(first, last + 1):
    profile.before(step, f"state {step - 1}")
    calls.append(step)
  profile.close()
  return calls


START, STOP = ("start", "/runs/a/profile"), ("stop",)


def test_profile_of_the_requested_steps(calls, capsys):
  assert profiled((3, 5), 1, 6, calls) == [1, 2, START, 3, 4, ("wait", "state 4"), STOP, 5, 6]
  assert capsys.readouterr().out == "profile of steps 3 to 4: /runs/a/profile\n"


@pytest.mark.parametrize(
  "steps, first, last, expected",
  [
    ((), 1, 3, [1, 2, 3]),
    ((3, 5), 4, 5, [START, 4, ("wait", "state 4"), STOP, 5]),  # resumed in the range
    ((3, 5), 5, 6, [5, 6]),  # or after it
    ((3, 9), 2, 4, [2, START, 3, 4, STOP]),  # ended before its last step
  ],
)
def test_profile_of_a_part_of_the_steps(calls, steps, first, last, expected):
  assert profiled(steps, first, last, calls) == expected


@pytest.mark.parametrize("steps", [(3,), (5, 3), (0, 2), (3, 3), (1.0, 2.0), (1, 2, 3), ("1", "2")])
def test_invalid_step_ranges_are_refused(steps):
  with pytest.raises(ValueError, match=r"profile_steps must be \(\) or two step numbers \(start, stop\)") as error:
    goodput.Profile(steps, "folder")
  assert str(steps) in str(error.value) and "\n" not in str(error.value)


def test_profile_steps_can_be_given_on_the_command_line():
  assert parse("debug", "--config.profile_steps=(3, 5)").profile_steps == (3, 5)


def test_only_process_0_writes_a_profile(calls, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert profiled((1, 2), 1, 2, calls) == [1, 2]


def test_jax_writes_the_profile(tmp_path):
  profile = goodput.Profile((1, 2), str(tmp_path / "profile"))
  for step in (1, 2):
    profile.before(step, jnp.ones(2))
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
