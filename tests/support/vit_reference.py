"""Vision transformers as computed by transformers and by DINO's own code: random weights and the resulting outputs.

python -m tests.support.vit_reference

writes tests/support/data/vit.npz, used where torch and transformers are not installed. Weights come from numpy.
"""

import json
from pathlib import Path
import zlib

import numpy as np
from safetensors.numpy import save_file

STORED = Path(__file__).parent / "data" / "vit.npz"
COMMON = dict(
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=2,
  patch_size=14,
  image_size=126,
  layer_norm_eps=1e-6,
  hidden_act="gelu",
  num_channels=3,
  qkv_bias=True,
)
DINOV2 = COMMON | dict(model_type="dinov2", mlp_ratio=4, use_swiglu_ffn=False)
LABELS = {"id2label": {str(i): f"class {i}" for i in range(5)}, "label2id": {f"class {i}": i for i in range(5)}}
CONFIGS = {  # config.json; position tables of 9 x 9 or 3 x 3 patches
  "vit": COMMON | dict(model_type="vit", intermediate_size=48, layer_norm_eps=1e-12),
  "dinov2": DINOV2,
  "giant": DINOV2 | LABELS | dict(use_swiglu_ffn=True),
  "registers": DINOV2 | LABELS | dict(model_type="dinov2_with_registers", num_register_tokens=3, image_size=42),
}
CASES = (*CONFIGS, "dino")
WIDTH, PATCH, GRID = 128, 16, 7  # for "dino": the authors' names, two heads, two blocks


def random(shapes):
  """Random weights {name: array}, seeded by name; scales are around 1."""
  found = {}
  for name, shape in shapes.items():
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.2, shape)
    if "norm" in name and name.endswith("weight") or "lambda" in name:
      x += 1
    found[name] = x.astype(np.float32)
  return found


def _linear(name, fan_in, fan_out):
  return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _norm(name, width):
  return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def weights(case):
  """Random weights {official name: array}."""
  if case == "dino":
    d = WIDTH
    shapes = {
      "cls_token": (1, 1, d),
      "pos_embed": (1, 1 + GRID**2, d),
      "patch_embed.proj.weight": (d, 3, PATCH, PATCH),
      "patch_embed.proj.bias": (d,),
    } | _norm("norm", d)
    for i in (f"blocks.{i}." for i in range(2)):
      shapes |= _norm(i + "norm1", d) | _norm(i + "norm2", d)
      shapes |= _linear(i + "attn.qkv", d, 3 * d) | _linear(i + "attn.proj", d, d)
      shapes |= _linear(i + "mlp.fc1", d, 4 * d) | _linear(i + "mlp.fc2", 4 * d, d)
    return random(shapes)
  c = CONFIGS[case]
  d, kind = c["hidden_size"], c["model_type"]
  p = f"{kind}." if "id2label" in c else ""
  e = p + "embeddings."
  patches = (c["image_size"] // c["patch_size"]) ** 2
  shapes = {
    e + "cls_token": (1, 1, d),
    e + "position_embeddings": (1, 1 + patches, d),
    e + "patch_embeddings.projection.weight": (d, 3, c["patch_size"], c["patch_size"]),
    e + "patch_embeddings.projection.bias": (d,),
  } | _norm(p + "layernorm", d)
  if kind == "vit":
    shapes |= _linear("pooler.dense", d, d)
  else:
    shapes[e + "mask_token"] = (1, d)
  if "num_register_tokens" in c:
    shapes[e + "register_tokens"] = (1, c["num_register_tokens"], d)
  if "id2label" in c:
    shapes |= _linear("classifier", 2 * d, len(c["id2label"]))
  for i in (f"{p}encoder.layer.{i}." for i in range(c["num_hidden_layers"])):
    for x in (
      "attention.attention.query",
      "attention.attention.key",
      "attention.attention.value",
      "attention.output.dense",
    ):
      shapes |= _linear(i + x, d, d)
    if kind == "vit":
      shapes |= _norm(i + "layernorm_before", d) | _norm(i + "layernorm_after", d)
      shapes |= _linear(i + "intermediate.dense", d, 48) | _linear(i + "output.dense", 48, d)
      continue
    shapes |= _norm(i + "norm1", d) | _norm(i + "norm2", d)
    shapes |= {i + "layer_scale1.lambda1": (d,), i + "layer_scale2.lambda1": (d,)}
    if c["use_swiglu_ffn"]:
      shapes |= _linear(i + "mlp.weights_in", d, 176) | _linear(i + "mlp.weights_out", 88, d)
    else:
      shapes |= _linear(i + "mlp.fc1", d, 4 * d) | _linear(i + "mlp.fc2", 4 * d, d)
  return random(shapes)


def write(case, folder):
  """Writes the weights; returns the argument for load_vit."""
  if case == "dino":
    save_file(weights(case), folder / "dino.safetensors")
    return folder / "dino.safetensors"
  (folder / "config.json").write_text(json.dumps(CONFIGS[case]))
  save_file(weights(case), folder / "model.safetensors", {"format": "pt"})
  return folder


def images(case, of_the_table=False):
  """Normalised images [2, h, w, 3]."""
  size = (4 * 14, 5 * 14)
  if case == "dino":
    size = (7 * 16, 7 * 16) if of_the_table else (4 * 16, 5 * 16)
  return np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)


def outputs(case, folder):
  """Returns {"features" [2, 1 + r + n, d], "logits" of a head} computed by torch from the files that `write` wrote."""
  import torch

  pixels = torch.from_numpy(images(case)).movedim(-1, 1)
  if case == "dino":
    model = _dino()
    with torch.no_grad():
      same = model(torch.from_numpy(images(case, True)).movedim(-1, 1))
      return {"features": model.get_intermediate_layers(pixels)[0].numpy(), "same": same.numpy()}
  import transformers

  name = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "giant": "Dinov2ForImageClassification",
    "registers": "Dinov2WithRegistersForImageClassification",
  }[case]
  model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
  assert not any(info.values()), info
  model.eval()
  how = dict(interpolate_pos_encoding=True) if case == "vit" else {}
  with torch.no_grad():
    found = {"features": model.base_model(pixels, **how).last_hidden_state.numpy()}
    if "id2label" in CONFIGS[case]:
      found["logits"] = model(pixels).logits.numpy()
  return found


def _dino():
  """DINO's own network, of which the dreamsim package contains a copy."""
  import functools
  import importlib.util

  import torch

  package = Path(importlib.util.find_spec("dreamsim").origin).parent
  place = package / "feature_extraction" / "vision_transformer.py"
  spec = importlib.util.spec_from_file_location("dino_vision_transformer", place)  # without the package's own imports
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
  model = module.VisionTransformer(
    [GRID * PATCH], PATCH, embed_dim=WIDTH, depth=2, num_heads=2, qkv_bias=True, norm_layer=norm
  )
  model.load_state_dict({k: torch.from_numpy(v) for k, v in weights("dino").items()})
  return model.eval()


def main():
  import tempfile

  found = {}
  for case in CASES:
    with tempfile.TemporaryDirectory() as folder:
      write(case, Path(folder))
      found |= {f"{case}/{name}": x for name, x in outputs(case, folder).items()}
  found["dino/features"] = found["dino/features"][:, ::3, ::2]
  STORED.parent.mkdir(exist_ok=True)
  np.savez_compressed(STORED, **found)


if __name__ == "__main__":
  main()
