"""The VAE with 16 latent channels on ImageNet, 256 px: 83.8M parameters, and a discriminator of 2.8M beside it.

  python -m flextok_jax.train --config=configs/vae_c16.py --workdir=DIR --config.vae_loss.lpips=WEIGHTS

WEIGHTS holds lpips_vgg.safetensors (docs/vae.md). Losses are those of latent diffusion's autoencoder_kl_*.yaml and its
LPIPSWithDiscriminator, which SDXL's and so FlexTok's VAE goes back to; the record gives nothing nearer. The rest is
[ours], with the reason where it is another.
"""

from flextok_jax import config as common


def get_config():
  return common.derive(
    stage="vae",
    vae=dict(latent_channels=16, dtype="bfloat16", scaling_factor=0.0),
    # [LDM] perceptual_weight 1.0 and kl_weight 1e-6, in the unit of means over pixels (common.py).
    vae_loss=dict(l1_weight=1.0, lpips_weight=1.0, kl_weight=1e-6 / (3 * 256 * 256)),
    discriminator=dict(weight=0.5, start_step=50_000),  # [LDM] disc_weight 0.5, disc_start 50001
    data=dict(global_batch=256),
    # [LDM] has 4.5e-6 times the batch, for both networks: 1.2e-3 here. This is its rate of a batch of 22 [ours].
    optim=dict(
      learning_rate=1e-4, warmup_steps=5_000, b2=0.999, weight_decay=0.0, discriminator=dict(learning_rate=1e-4)
    ),
    train=dict(num_steps=200_000),
  )
