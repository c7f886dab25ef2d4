"""Configs as commands parse them."""

from absl import flags
from ml_collections import ConfigDict

from flextok_jax import cli
from flextok_jax.configs import ar, distill, finetune, flextok, vae
from tests.support.commands import ROOT

FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
_ARGUMENTS = {
  "ar": [*ar.CLASS, *ar.TEXT],
  "distill": list(distill.MODELS),
  "finetune": list(finetune.MODELS),
  "flextok": list(flextok.MODELS),
  "glyphs": ["", "next", "mixed", "vae", "vae_next", "vae_detail", "groups", "text"],
  "shapes": ["", "coarse", "grid", "mixed"],
  "shapes_ar": ["", "text", "stop"],
  "vae": list(vae.CHANNELS),
}
SPECS = [f"{file}:{arg}".rstrip(":") for file in FILES for arg in _ARGUMENTS.get(file, [""])]  # all shipped configs


def parse(spec: str, *args: str) -> ConfigDict:
  """Returns the config given by --config=SPEC and further arguments."""
  values, argv = flags.FlagValues(), ["test", f"--config={spec}", *args]
  holder = cli.define_config_flag("", values, argv)
  values(argv)
  return holder.value
