"""The VAE on ImageNet, 256 px, 8x down, with 4, 8 or 16 latent channels (c4, c8, c16): 83.8M parameters.

Its discriminator has 2.8M more.

  python -m flextok_jax.train --config=vae:c16 --workdir=DIR --config.vae_loss.lpips=WEIGHTS

WEIGHTS is a folder with lpips_vgg.safetensors (docs/vae.md). A tokenizer over c4 or c8 needs
--config.vae.latent_channels=4 (or 8) and --config.vae.scaling_factor=0 besides --config.init_from.

The losses are those of latent diffusion's autoencoder_kl_*.yaml and its LPIPSWithDiscriminator, from which SDXL's VAE
descends, and FlexTok's from that; the public record has nothing closer. Other values are [ours], with the reason where
they differ.

Hardware: one host of accelerators. Not run at this size; glyphs:vae is a small one that was.
"""

from flextok_jax import config as common

CHANNELS = {"c4": 4, "c8": 8, "c16": 16}


def get_config(channels: str = ""):
  """Returns the config of one of CHANNELS."""
  common.check_argument("vae", channels, CHANNELS)
  return common.derive(
    stage="vae",
    vae=dict(latent_channels=CHANNELS[channels], dtype="bfloat16", scaling_factor=0.0),
    # [LDM] perceptual_weight 1.0 and kl_weight 1e-6, converted to means over pixels (flextok_jax/config/defaults.py).
    vae_loss=dict(l1_weight=1.0, lpips_weight=1.0, kl_weight=1e-6 / (3 * 256 * 256)),
    discriminator=dict(weight=0.5, start_step=50_000),  # [LDM] disc_weight 0.5, disc_start 50001
    data=dict(global_batch=256),
    # [LDM] has 4.5e-6 times the batch for both networks, 1.2e-3 here. This is its rate for a batch of 22 [ours].
    optim=dict(
      learning_rate=1e-4, warmup_steps=5_000, b2=0.999, weight_decay=0.0, discriminator=dict(learning_rate=1e-4)
    ),
    train=dict(num_steps=200_000),
  )
