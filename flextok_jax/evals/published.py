"""Published reconstructions of the validation set of ImageNet at 256 px, to read beside ours."""

from collections.abc import Mapping
from typing import Any

from flextok_jax.evals.report import Table

IMAGE_SIZE = 256
_FLEXTOK = "FlexTok (arXiv 2502.13967) and its reviews"
_COSMOS = "the Cosmos paper, as cited there"
ROWS = (  # model, tokens, PSNR in dB, SSIM, source
  *(
    ("FlexTok d18-d28", tokens, psnr, ssim, _FLEXTOK)
    for tokens, psnr, ssim in (
      (1, 9.35, 0.187),
      (2, 10.25, 0.222),
      (4, 11.51, 0.254),
      (8, 11.90, 0.269),
      (16, 13.05, 0.304),
      (32, 13.96, 0.330),
      (64, 14.34, 0.343),
      (128, 15.90, 0.407),
      (256, 17.70, 0.489),
    )
  ),
  ("Open-MAGVIT2 16x16", 256, 17.00, 0.398, _COSMOS),
  ("LlamaGen 16x16", 256, 18.38, 0.338, _COSMOS),
  ("Cosmos-0.1 16x16", 256, 20.49, 0.518, _COSMOS),
)


def is_imagenet_validation(settings: Mapping[str, Any]) -> bool:
  """Returns whether the settings of a data source name ImageNet: its TFDS name, or a folder that says so."""
  texts = (str(settings.get(name) or "").lower() for name in ("val_path", "path", "name", "dataset"))
  return any(word in text for text in texts for word in ("imagenet", "ilsvrc"))


def table(name: str, by_tokens: Mapping[str, Mapping[str, float]]) -> Table | None:
  """Returns our PSNR and SSIM by tokens of a set and the published ones; None without either metric."""
  ours = [
    ("ours", int(column) if column.isdecimal() else column, values.get("psnr"), values.get("ssim"), "this evaluation")
    for column, values in by_tokens.items()
    if "psnr" in values or "ssim" in values
  ]
  if not ours:
    return None
  rows = [
    [model, tokens, psnr and f"{psnr:.2f}", ssim and f"{ssim:.3f}", source]
    for model, tokens, psnr, ssim, source in (*ours, *ROWS)
  ]
  title = f"{name}: published reconstructions of ImageNet validation at {IMAGE_SIZE} px"
  return Table(title, ["model", "tokens", "PSNR dB", "SSIM", "source"], rows)
