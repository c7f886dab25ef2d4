"""The VAE with 16 latent channels on ImageNet, 256 px: 83.8M parameters, by reconstruction and KL losses.

  python -m flextok_jax.train --config=configs/vae_c16.py --workdir=DIR

The public record gives no hyperparameters of this training: all here are [ours].
"""

from configs import common


def get_config():
  return common.derive(
      stage="vae",
      vae=dict(latent_channels=16, dtype="bfloat16"),
      vae_loss=dict(kl_weight=1e-6),
      data=dict(global_batch=256),
      optim=dict(learning_rate=1e-4, warmup_steps=5_000, b2=0.999, weight_decay=0.0),
      train=dict(num_steps=200_000),
  )
