"""A small VAE on the photographs of scikit-image and scikit-learn: 48 px, 4x down, 4 channels, 0.2M parameters, CPU.

  python -m flextok_jax.train --config=photos_vae --workdir=DIR/start
  bash launch/sweep.sh photos_vae:next DIR --config.init_from=DIR/start

The first run is trained with L1 alone. The runs of the sweep start from its weights, with and without a discriminator,
for the same number of steps on the same images. 3 to 8 minutes each on two busy CPU threads; results: docs/vae.md.
"""

from flextok_jax import config as common


def get_config(arg: str = ""):
  common.check_argument("photos_vae", arg, ("", "next"))
  c = common.derive(
    stage="vae",
    image_size=48,
    dtype="float32",
    vae=dict(latent_channels=4, block_out_channels=(16, 24, 32), layers_per_block=1, norm_groups=4, scaling_factor=0.0),
    vae_loss=dict(kl_weight=1e-7),
    discriminator=dict(start_step=0, channels=16, num_layers=2),  # weight: in get_sweep
    data=dict(global_batch=8, num_threads=1, sources=dict(photos=dict(weight=1.0), tfds=dict(weight=0.0))),
    optim=dict(
      learning_rate=2e-3,
      end_learning_rate=5e-4,
      warmup_steps=50,
      weight_decay=0.0,
      ema_decay=0.99,
      discriminator=dict(learning_rate=2e-4),
    ),
    train=dict(
      num_steps=1_500,
      log_every=100,
      checkpoint_every=250,
      keep_checkpoints=1,
      keep_period=0,
      eval_every=10_000,
      tensorboard=False,
      export_dtype="float32",
    ),
    eval=dict(sources=("photos",), num_images=256, batch_size=64, grid_images=8),
  )
  if arg == "next":
    c.update(seed=1, optim=dict(learning_rate=5e-4), train=dict(num_steps=500))
  return c


def get_sweep(arg: str = "") -> dict[str, dict[str, float]]:
  """Returns {run: {dotted field: value}}."""
  del arg
  return {
    "l1": {"discriminator.weight": 0.0},
    "gan_light": {"discriminator.weight": 0.03},
    "gan": {"discriminator.weight": 0.1},
  }
