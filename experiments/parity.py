"""How far is the loaded golden model from the reference implementation's numbers, in float32 and in bfloat16?

JAX_PLATFORMS=cpu python -m experiments.parity

Needs the golden files in ../shared/golden. Their weights are random: errors do not average out as in a trained model.
"""

import jax
import numpy as np
from safetensors.numpy import load_file

import flextok_jax
from flextok_jax import cli
from tests.conftest import SHARED

SAMPLES = {"cfg": dict(guidance="cfg", guidance_scale=3.0), "apg": {}, "apg_full": {}}


def measure(dtype: str) -> dict[str, str]:
  """Returns {quantity: gap} for the model loaded in dtype."""
  arrays = load_file(SHARED / "golden" / "flextok_tiny_io.safetensors")
  golden = {k: np.moveaxis(v, -3, -1) if v.ndim >= 4 else v for k, v in arrays.items()}
  path = SHARED / "golden" / "flextok_tiny.safetensors"
  model = flextok_jax.load(path, dtype=dtype, vae_norm_num_groups=4, image_size=64)
  largest = lambda actual, name: float(np.abs(np.asarray(actual) - golden[name]).max())
  relative = lambda gap, name: f"{gap:.1e} of {np.abs(golden[name]).max():.1f}"

  rows = {}
  rows["VAE latents, largest gap"] = relative(
    largest(model.encode_latents(golden["images"]), "vae_latents"), "vae_latents"
  )
  ids = np.asarray(model.tokenize(golden["images"]))
  rows["token ids equal"] = f"{(ids == golden['tokens']).sum()} of {ids.size}"
  v = lambda **kwargs: model.velocity(golden["step_x"], golden["step_t"], golden["tokens"], **kwargs)
  gaps = [largest(v(keep_k=golden[f"step_keep{i}"]), f"step_v{i}") for i in range(3)]
  gaps.append(largest(v(drop_condition=True), "step_v_null"))
  rows["velocities, largest gap"] = relative(max(gaps), "step_v0")
  for name, settings in SAMPLES.items():
    images = model.detokenize(
      golden["tokens"], golden[f"sample_{name}_keep"], noise=golden["sample_init_noise"], **settings
    )
    gap, top = largest(images, f"sample_{name}_image"), f"sample_{name}_image"
    rows[f"images after 25 steps, {name}, largest gap"] = relative(gap, top)
    clipped = [np.clip(x, -1, 1) for x in (images, golden[top])]
    mse = np.square(clipped[0] - clipped[1]).mean((1, 2, 3)) / 4
    rows[f"images after 25 steps, {name}, PSNR"] = f"{-10 * np.log10(mse).mean():.1f} dB"
  return rows


def main():
  """Prints a table of the gaps."""
  if SHARED is None:
    raise FileNotFoundError("../shared/golden does not exist beside the repository: nothing to compare with")
  columns = {dtype: measure(dtype) for dtype in ("float32", "bfloat16")}
  print(f"{jax.default_backend()}, jax {jax.__version__}")
  print(f"{'':<44}{'float32':>20}{'bfloat16':>20}")
  for name, value in columns["float32"].items():
    print(f"{name:<44}{value:>20}{columns['bfloat16'][name]:>20}")


if __name__ == "__main__":
  cli.run(main)
