"""A small VAE on the photographs of scikit-image and scikit-learn: 48 px, 4x down, 4 channels, on a CPU.

  python -m flextok_jax.train --config=configs/photos_vae.py:gan --workdir=DIR
  bash launch/sweep.sh configs/photos_vae.py DIR   # l1, and gan: the same with a discriminator

docs/vae.md has what came out.
"""

from configs import common


def get_config(arg: str = ""):
  if arg not in ("", "gan"):
    raise ValueError(f"configs/photos_vae.py takes no argument, or 'gan', got {arg!r}")
  return common.derive(
      stage="vae",
      image_size=48,
      dtype="float32",
      vae=dict(latent_channels=4, block_out_channels=(16, 24, 32), layers_per_block=1, norm_groups=4,
               scaling_factor=0.0),
      vae_loss=dict(kl_weight=1e-7),
      discriminator=dict(weight=0.5 if arg else 0.0, start_step=400, channels=16, num_layers=2),
      data=dict(global_batch=8, num_threads=1, sources=dict(photos=dict(weight=1.0), tfds=dict(weight=0.0))),
      optim=dict(learning_rate=1.5e-3, end_learning_rate=1.5e-4, warmup_steps=50, weight_decay=0.0, ema_decay=0.99,
                 discriminator=dict(learning_rate=5e-4)),
      train=dict(num_steps=1_500, log_every=100, checkpoint_every=500, keep_period=0, eval_every=500,
                 export_dtype="float32"),
      eval=dict(sources=("photos",), num_images=256, batch_size=64, grid_images=8),
  )  # fmt: skip


def get_sweep(arg: str = "") -> dict[str, dict[str, float]]:
  """Returns the runs to compare, by name, as dotted overrides."""
  del arg
  return {"l1": {"discriminator.weight": 0.0}, "gan": {"discriminator.weight": 0.5}}
