"""Where the time of a run goes: shares by activity of the host, MFU, and a profile of a few steps."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import os
import time
from typing import Any

from flax.core.meta import unbox
import jax
from ml_collections import ConfigDict

from flextok_jax.config import with_fields
from flextok_jax.core import accelerators, flops
from flextok_jax.data.shapes import Bucket
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs, optim
from flextok_jax.training.state import init_state, make_update

KINDS = ("step", "data", "save", "evaluate", "compile", "other")


class Goodput:
  """Divides the wall-clock time since its creation among KINDS.

  It never waits for the devices, which compute while the host does other things: "step" includes the time in which the
  host waits for their results.

  Args:
    clock: monotonic, in seconds.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock, self._since, self._kind = clock, clock(), "other"
    self._seconds = dict.fromkeys(KINDS, 0.0)

  def _switch(self, kind: str) -> None:
    now = self._clock()
    self._seconds[self._kind] += now - self._since
    self._since, self._kind = now, kind

  @contextlib.contextmanager
  def spending(self, kind: str, behind: Any = ()):
    """Counts the time inside as `kind`, instead of as the kind of the enclosing block.

    Args:
      kind: one of KINDS.
      behind: arrays that the devices may still be computing. If they are not ready at the end, the devices did not have
        to wait, and the time counts as "step".
    """
    before = self._kind
    self._switch(kind)
    try:
      yield
    finally:
      if not all(x.is_ready() for x in jax.tree.leaves(behind)):
        self._kind = "step"
      self._switch(before)

  def shares(self) -> dict[str, float]:
    """Returns the share of each kind as time/KIND; they add up to 1."""
    self._switch(self._kind)
    total = sum(self._seconds.values())
    return {f"time/{kind}": seconds / total if total else 0.0 for kind, seconds in self._seconds.items()}


def summary(scalars: Mapping[str, float]) -> str:
  """Returns a line for the console: MFU, if the scalars have it, and the shares of at least one percent."""
  mfu = [f"MFU {scalars['mfu']:.1%}"] if "mfu" in scalars else []
  shares = {kind: scalars.get(f"time/{kind}", 0.0) for kind in KINDS}
  return "  ".join([*mfu, " ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.01)])


def update_flops(config: ConfigDict, image_shape: tuple[int, int] | None = None) -> int:
  """Returns the FLOPs of an update over the global batch (core/flops.py), including the frozen VAE's encoder.

  Not included is what runs outside of the update: the encoder of texts and REPA's teacher.

  Args:
    config: of the run.
    image_shape: height and width of the images; default: image_size.
  """
  config = with_fields(config, {"attention": "xla"})  # other implementations use kernels that cannot be counted
  stage, optimizer = make_stage(config), optim.make_optimizer(config.optim, config.train.num_steps)
  key = jax.eval_shape(jax.random.key, 0)
  state = unbox(jax.eval_shape(lambda key: init_state(stage, optimizer, key), key))
  update = make_update(stage, optimizer, accumulate_steps=config.optim.accumulate_steps, decay=config.optim.ema_decay)
  return flops.count(update, state, inputs.abstract_batch(config, stage, image_shape), key)


def make_mfu(
  config: ConfigDict, devices: Sequence[jax.Device], buckets: Sequence[Bucket] = ()
) -> Callable[[float], dict[str, float]]:
  """Returns a function of images per second: {"mfu": share of the devices' peak}, or {} if no peak is known (CPU).

  Operations that config.remat recomputes are not counted. With several shapes, the FLOPs are their mean by weight.

  Args:
    config: of the run.
    devices: of the run.
    buckets: inputs.open_buckets(config).
  """
  device = accelerators.known(devices[0])
  if device is None:
    return lambda rate: {}
  config = with_fields(config, {"remat": "none"})
  if buckets:
    image_flops = sum(bucket.weight * update_flops(config, bucket.shape) for bucket in buckets)
  else:
    image_flops = update_flops(config)
  image_flops /= config.data.global_batch
  return lambda rate: {"mfu": rate * image_flops / (device.flops * len(devices))}


class Profile:
  """JAX profile of the steps from `start` to `stop` - 1 on process 0, for TensorBoard or Perfetto.

  Args:
    steps: (start, stop), or () for no profile.
    folder: where the profile is written.
    name: of the folder, for people; "": its path.

  Raises:
    ValueError: steps are neither () nor such a pair.
  """

  def __init__(self, steps: tuple[int, ...], folder: str | os.PathLike, name: str = ""):
    pair = len(steps) == 2 and all(isinstance(step, int) for step in steps) and 1 <= steps[0] < steps[1]
    if steps and not pair:
      raise ValueError(f"profile_steps must be () or two step numbers (start, stop), 1 <= start < stop, got {steps}")
    self._steps, self._folder = range(*steps or (0,)), os.path.abspath(folder)
    self._name = name or self._folder
    self._running = False

  def before(self, step: int, state: Any) -> None:
    """Starts or ends the profile; call it before each step. At the end it waits for the state."""
    if self._running and step not in self._steps:
      jax.block_until_ready(state)
      self.close()
    elif not self._running and step in self._steps and jax.process_index() == 0:
      jax.profiler.start_trace(self._folder)
      self._running = True

  def close(self) -> None:
    """Ends the profile if it is running."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
      print(f"profile of steps {self._steps.start} to {self._steps.stop - 1}: {self._name}", flush=True)
