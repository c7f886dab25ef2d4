"""CLIP as computed by transformers: random weights and the resulting outputs.

python -m tests.support.clip_reference

writes tests/support/data/clip.npz, used where torch and transformers are not installed. Weights come from numpy.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.vit_reference import _linear, _norm, random

STORED = Path(__file__).parent / "data" / "clip.npz"
IMAGE = dict(
  hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, patch_size=8, image_size=24
)
TEXT = dict(
  hidden_size=24,
  num_hidden_layers=3,
  num_attention_heads=3,
  intermediate_size=40,
  vocab_size=60,
  max_position_embeddings=11,
  eos_token_id=59,
  bos_token_id=58,
  pad_token_id=0,
)
CONFIGS = {  # config.json: OpenAI's activation, omitted as transformers omits it, and LAION's
  "openai": dict(model_type="clip", projection_dim=16, vision_config=IMAGE, text_config=TEXT),
  "laion": dict(
    model_type="clip",
    projection_dim=16,
    vision_config=IMAGE | dict(hidden_act="gelu"),
    text_config=TEXT | dict(hidden_act="gelu"),
  ),
}
LENGTHS = np.array([11, 2, 5], np.int32)


def weights():
  """Random weights {official name: array}."""
  shapes = {"logit_scale": (), "visual_projection.weight": (16, 32), "text_projection.weight": (16, 24)}
  p = "vision_model.embeddings."
  shapes |= {
    p + "class_embedding": (32,),
    p + "patch_embedding.weight": (32, 3, 8, 8),
    p + "position_embedding.weight": (10, 32),
  }
  shapes |= _norm("vision_model.pre_layrnorm", 32) | _norm("vision_model.post_layernorm", 32)
  p = "text_model.embeddings."
  shapes |= {p + "token_embedding.weight": (60, 24), p + "position_embedding.weight": (11, 24)}
  shapes |= _norm("text_model.final_layer_norm", 24)
  for tower, c in (("vision_model", IMAGE), ("text_model", TEXT)):
    d, f = c["hidden_size"], c["intermediate_size"]
    for i in (f"{tower}.encoder.layers.{i}." for i in range(c["num_hidden_layers"])):
      shapes |= _norm(i + "layer_norm1", d) | _norm(i + "layer_norm2", d)
      shapes |= _linear(i + "mlp.fc1", d, f) | _linear(i + "mlp.fc2", f, d)
      for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= _linear(i + f"self_attn.{x}", d, d)
  return random(shapes)


def write(case, folder):
  (folder / "config.json").write_text(json.dumps(CONFIGS[case]))
  found = weights() | {"text_model.embeddings.position_ids": np.arange(11)[None]}  # as in old files
  save_file(found, folder / "model.safetensors", {"format": "pt"})
  return folder


def images():
  """Normalised images [2, 24, 24, 3]."""
  return np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)


def ids():
  """Token ids [3, 11], which end with 59 at LENGTHS."""
  rows = np.random.default_rng(1).integers(1, 58, (3, 11)).astype(np.int32)
  rows[:, 0] = 58
  rows[np.arange(3), LENGTHS - 1] = 59
  return np.where(np.arange(11) < LENGTHS[:, None], rows, 0)


def outputs(case, folder):
  """Returns {"image" [2, 16], "text" [3, 16]} computed by transformers from the files that `write` has written."""
  import torch
  import transformers

  model, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
  assert not info["missing_keys"] and not info["mismatched_keys"], info
  with torch.no_grad():
    found = model.eval()(
      input_ids=torch.from_numpy(ids()).long(), pixel_values=torch.from_numpy(images()).movedim(-1, 1)
    )
  return {"image": found.image_embeds.numpy(), "text": found.text_embeds.numpy()}


def main():
  import tempfile

  found = {}
  for case in CONFIGS:
    with tempfile.TemporaryDirectory() as folder:
      found |= {f"{case}/{name}": x for name, x in outputs(case, write(case, Path(folder))).items()}
  np.savez_compressed(STORED, **found)


if __name__ == "__main__":
  main()


def write_tokenizer(folder, start="<|startoftext|>"):
  """Writes a tokenizer.json with the structure of CLIP's; returns its words and the tokenizer."""
  tokenizers = pytest.importorskip("tokenizers")
  words = [start, "<|endoftext|>", *(c + end for c in "abcdefr!é" for end in ("", "</w>")), "re", "red</w>"]
  model = tokenizers.models.BPE(
    {w: i for i, w in enumerate(words)},
    [("r", "e"), ("re", "d</w>")],
    end_of_word_suffix="</w>",
    unk_token="<|endoftext|>",
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.Lowercase()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("<|endoftext|>", 1), (start, 0), False, False)
  tokenizer.enable_truncation(3)
  tokenizer.enable_padding(pad_id=1, pad_token="<|endoftext|>")
  tokenizer.save(str(folder / "tokenizer.json"))
  tokenizer.enable_truncation(7)
  return words, tokenizer
