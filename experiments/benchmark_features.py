"""How fast are FID's Inception features? Images per second in jax, and in pytorch-fid where it is installed.

python -m experiments.benchmark_features [--batch=8] [--size=256] [--rounds=5] [--out=FILE.jsonl]

All networks have the same random weights and process the same images. Each round computes a batch in every way, in
alternating order, so that other work on the machine affects all ways alike:

- jax: models/perception/inception.py;
- pytorch: pytorch-fid's network as that program runs it;
- channels_last: the same with the memory layout that suits PyTorch's convolutions best.

Prints a table with the largest difference of the features; --out receives a JSON line for each way. If PyTorch or
pytorch-fid is not installed, only the first way is measured, and a line says so.
"""

from collections.abc import Callable
import json
from pathlib import Path
import statistics
import time
from unittest import mock

from absl import flags
import jax
import numpy as np

from flextok_jax import cli
from flextok_jax.core import files, timing
from flextok_jax.models.perception.inception import FIDInception
from flextok_jax.weights.perception import inception as inception_files

_FLAGS = {"batch": (8, "Images per batch."), "size": (256, "Pixels per side."), "rounds": (5, "Timed rounds.")}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  for name, (default, text) in _FLAGS.items():
    flags.DEFINE_integer(name, default, text, flag_values=values)
  flags.DEFINE_string("out", None, "File for the JSON lines; overwritten.", flag_values=values)


def main(values: flags.FlagValues):
  """Measures with the settings of the flags."""
  for name in _FLAGS:
    if values[name].value < 1:
      raise ValueError(f"--{name}={values[name].value} must be at least 1")
  tensors = random_tensors(0)
  images = np.random.default_rng(1).random((values.batch, values.size, values.size, 3), np.float32)
  ways = {"jax": jax_features(tensors, images)}
  try:
    ways |= pytorch_features(tensors, images)
  except ImportError as e:
    print(f"no comparison with PyTorch ({e}): pip install torch torchvision pytorch-fid")
  rows = measure(ways, values.batch, values.rounds)
  print(format_report(rows, f"{values.batch} images of {values.size} px per batch on {jax.devices()[0].device_kind}"))
  if values.out:
    files.write_file(Path(values.out), "".join(json.dumps(row) + "\n" for row in rows).encode())


def random_tensors(seed: int) -> dict[str, np.ndarray]:
  """Returns weights under their official names, scaled so that no feature map vanishes or explodes."""
  rng, tensors = np.random.default_rng(seed), {}
  normal = lambda deviation, shape: (deviation * rng.standard_normal(shape, np.float32)).astype(np.float32)
  for path, shape in inception_files.parameter_shapes().items():
    if not path.endswith("/kernel"):
      continue
    *kernel, inputs, outputs = shape
    module = path.removesuffix("/kernel").replace("/", ".")
    if module == "fc":
      tensors["fc.weight"] = normal(inputs**-0.5, (outputs, inputs))
      tensors["fc.bias"] = normal(1, outputs)
      continue
    tensors[f"{module}.conv.weight"] = normal((2 / (np.prod(kernel) * inputs)) ** 0.5, (outputs, inputs, *kernel))
    tensors[f"{module}.bn.weight"] = 1 + normal(0.1, outputs)
    tensors[f"{module}.bn.bias"] = normal(0.1, outputs)
    tensors[f"{module}.bn.running_mean"] = normal(0.1, outputs)
    tensors[f"{module}.bn.running_var"] = np.square(1 + normal(0.1, outputs))
  return tensors


def jax_features(tensors: dict[str, np.ndarray], images: np.ndarray) -> Callable[[], np.ndarray]:
  """Returns a function that computes FID's features [b, 2048] of images [b, h, w, 3] in [0, 1]."""
  params, images = jax.device_put((inception_files.from_official("", tensors), images))
  network = FIDInception("pytorch")
  run = jax.jit(lambda params, images: network.apply({"params": params}, images)["pool"])
  return lambda: np.asarray(run(params, images))


def pytorch_features(tensors: dict[str, np.ndarray], images: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
  """Returns the same for each way of running PyTorch.

  Raises:
    ImportError: PyTorch or pytorch-fid is not installed.
  """
  from pytorch_fid import inception
  import torch

  found = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
  with mock.patch.object(inception, "load_state_dict_from_url", lambda *args, **kwargs: found):  # nothing is downloaded
    networks = {"pytorch": inception.InceptionV3().eval(), "channels_last": inception.InceptionV3().eval()}
  images = torch.from_numpy(images).permute(0, 3, 1, 2)
  inputs = {"pytorch": images.contiguous(), "channels_last": images.contiguous(memory_format=torch.channels_last)}
  networks["channels_last"].to(memory_format=torch.channels_last)

  def run(way: str) -> np.ndarray:
    with torch.no_grad():
      return networks[way](inputs[way])[0][:, :, 0, 0].numpy()

  return {way: lambda way=way: run(way) for way in networks}


def measure(ways: dict[str, Callable[[], np.ndarray]], batch: int, rounds: int) -> list[dict]:
  """Returns a row for each way: {"way", "images_per_second": one per round, "cpu_ms", "gap"}.

  cpu_ms is the processor time per image in milliseconds, which other programs hardly affect; gap is the largest
  difference between a feature and that of the first way.
  """
  features = {way: run() for way, run in ways.items()}  # compiles; not timed
  rates, cpu = {way: [] for way in ways}, {way: [] for way in ways}
  for index in range(rounds):
    for way in list(ways)[:: -1 if index % 2 else 1]:
      wall, busy = time.perf_counter(), time.process_time()
      ways[way]()
      rates[way].append(batch / (time.perf_counter() - wall))
      cpu[way].append(1e3 * (time.process_time() - busy) / batch)
  first = next(iter(features.values()))
  return [
    {
      "way": way,
      "images_per_second": rates[way],
      "cpu_ms": statistics.median(cpu[way]),
      "gap": float(np.abs(features[way] - first).max()),
    }
    for way in ways
  ]


def format_report(rows: list[dict], title: str) -> str:
  """Returns a table of the ways with medians and ranges over the rounds."""
  lines = [title, f"{'':14}{'images/s':>10}{'(min .. max)':>18}{'jax over it':>13}{'CPU ms per image':>17}{'gap':>10}"]
  for row in rows:
    value, least, most = (timing.digits(f(row["images_per_second"])) for f in (statistics.median, min, max))
    ratio = statistics.median(a / b for a, b in zip(rows[0]["images_per_second"], row["images_per_second"]))
    lines.append(
      f"{row['way']:14}{value:>10}{f'({least} .. {most})':>18}{timing.digits(ratio):>13}"
      f"{timing.digits(row['cpu_ms']):>17}{row['gap']:>10.1e}"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
