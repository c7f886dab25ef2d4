"""The trainable stages, behind the one interface that training, evaluation and commands use."""

import jax
from ml_collections import ConfigDict

from flextok_jax.config import TOKENIZER_STAGES, check
from flextok_jax.models import transformer
from flextok_jax.stages import ar
from flextok_jax.stages.ar import ARStage
from flextok_jax.stages.distill import DistillStage
from flextok_jax.stages.stage import Stage
from flextok_jax.stages.tokenizer import TokenizerStage
from flextok_jax.stages.vae import VAEStage

_STAGES = {"tokenizer": TokenizerStage, "distill": DistillStage, "vae": VAEStage, "ar": ARStage}


def make_stage(config: ConfigDict) -> Stage:
  """Returns the stage named by config.stage.

  Raises:
    ValueError: a field is out of its range, sizes do not fit together, or train.parts or lora.parts name a
      part that the stage does not train.
  """
  check(config)
  stage = _STAGES[config.stage](config)
  stage.train_only(config.train.parts)
  stage.use_lora(**config.lora)
  return stage


def divided_by_tensor(config: ConfigDict) -> dict[str, int]:
  """Returns what the mesh axis "tensor" divides: {"heads of the encoder": number, ...}; {} for a VAE."""
  if config.stage == "ar":
    return {"heads": config.ar.width // config.ar.head_dim, "hidden units": ar.mlp_hidden(config.ar)}
  counts = {}
  for name in ("encoder", "decoder") if config.stage in TOKENIZER_STAGES else ():
    part = config[name]
    counts[f"heads of the {name}"] = part.width // part.head_dim
    counts[f"hidden units of the {name}"] = transformer.mlp_hidden(part.width, part.mlp_ratio, part.gated_mlp)
  return counts


def check_mesh(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError if the mesh axis "tensor" divides nothing, or leaves a remainder."""
  tensor, counts = mesh.shape["tensor"], divided_by_tensor(config)
  if tensor > 1 and not counts:
    raise ValueError(f"mesh.tensor={tensor} has no effect in stage {config.stage!r}, which has no heads: use mesh.fsdp")
  for what, count in counts.items():
    if count % tensor:
      raise ValueError(f"mesh.tensor={tensor} does not divide the {count} {what}: use a divisor, or mesh.fsdp")
