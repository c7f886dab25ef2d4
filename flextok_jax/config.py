"""The default of every field of a config, with its unit and source; parsing of configs and of config files.

Sources: [paper] FlexTok, arXiv 2502.13967; [code] the public inference code; [video] the sibling video tokenizer,
arXiv 2604.12887; [LDM] latent diffusion, Rombach et al. 2022, and its code; [taming] Esser et al. 2021, and its code;
[ours] not in the public record: our choice, with the reason.
"""

from collections.abc import Iterable, Mapping
import importlib
import inspect
import json
import os
from pathlib import Path
import pkgutil
from types import ModuleType
from typing import Any

from flax.traverse_util import flatten_dict
import jax.numpy as jnp
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the base configuration: FlexTok d12-d12 on ImageNet at 256 px."""
  c = ConfigDict()
  c.stage = "tokenizer"  # "tokenizer" (frozen VAE), "vae", or "ar" (generator of token ids)
  c.seed = 0  # initialisation, data order, noise
  c.image_size = 256  # pixels; height = width [paper]
  # Compute dtype; parameters, norms, softmax, FSQ and losses are float32. Devices sum gradients in the dtype in which
  # they are computed, so those of the blocks' matrices in this one; optim.accumulate_steps sums in float32.
  c.dtype = "bfloat16"
  c.fast = True  # exact optimizations: merged masked tokens, buckets, ...; False: the slow reference path
  c.attention = "auto"  # implementation: "auto", "xla", "cudnn" (GPU), "pallas" (TPU)
  # Rematerialization in the blocks: "none"; "dots": recompute all but the products with weights; "full": recompute
  # everything, for about a third more FLOPs.
  c.remat = "none"
  # (start, stop): profile the steps start to stop - 1, for TensorBoard or Perfetto, into workdir/profile.
  c.profile_steps = ()
  c.init_from = ""  # weights to start from (a workdir or a .safetensors file): those of the top-level parts it has

  c.vae = ConfigDict()
  c.vae.kind = "autoencoder_kl"  # or "pixels": no VAE, latents are the scaled image
  c.vae.latent_channels = 16  # 4, 8 or 16 [paper]; ignored for "pixels" (3)
  c.vae.block_out_channels = (128, 256, 512, 512)  # 8x down: stride 2 after each level but the last [code]
