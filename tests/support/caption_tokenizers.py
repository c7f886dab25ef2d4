"""Small caption tokenizers in the file formats of a T5."""

import io
from pathlib import Path

import pytest

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "cube", "ball", "and")


def word_level(folder: Path, words=WORDS):
  """Writes a tokenizer.json with its own settings for end tokens, truncation and padding."""
  tokenizers = pytest.importorskip("tokenizers")
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  if "</s>" in words:
    model.post_processor = tokenizers.processors.TemplateProcessing(
      single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
  model.enable_truncation(4)
  model.enable_padding(length=30, pad_id=8)
  model.save(str(folder / "tokenizer.json"))


def sentence_pieces(folder: Path, **kwargs):
  """Writes a spiece.model and returns its model."""
  sentencepiece = pytest.importorskip("sentencepiece")
  model = io.BytesIO()
  known = dict(
    vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1
  )
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a red cube and a blue ball", "two red balls", "blue cubes and red ones"] * 5),
    model_writer=model,
    **(known | kwargs),
  )
  (folder / "spiece.model").write_bytes(model.getvalue())
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
