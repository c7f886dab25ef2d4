"""FlexTok d12-d12 on ImageNet, 256 px: 341.3M parameters with the VAE. All as in common.py, and REPA.

The VAE is frozen: train one first (configs/vae_c16.py) and start from it, its workdir or its weights file:

  python -m flextok_jax.train --config=configs/flextok_d12_d12_in1k.py --workdir=DIR --config.init_from=VAE

REPA's teacher, DINOv2-L, comes from the Hugging Face hub, or is a folder at --config.repa.teacher; to train without it,
--config.repa.weight=0 (docs/repa.md).
"""

from flextok_jax import config as common


def get_config():
  return common.derive(repa=dict(weight=1.0))
