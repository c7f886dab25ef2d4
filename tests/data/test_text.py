"""Converting captions to token ids."""

import pickle
from unittest import mock

import numpy as np
import pytest

from flextok_jax.data import text
from tests.support.caption_tokenizers import WORDS, sentence_pieces, word_level


def test_bytes():
  tokenizer = text.make_tokenizer("bytes", 10)
  captions = ["", "cat", "é" * 4, "é" * 5, "x" * 9, "x" * 99, "\ud800"]
  ids, lengths = tokenizer(captions)
  assert ids.shape == (7, 10) and ids.dtype == lengths.dtype == np.int32 and tokenizer.vocab_size == 257
  assert lengths.tolist() == [1, 4, 9, 9, 10, 10, 2]
  for row, length, caption in zip(ids, lengths, captions[:-1]):
    assert row[length - 1] == 256 and not row[length:].any()
    assert caption.startswith(bytes(row[: length - 1].tolist()).decode())  # characters are never split
  assert tokenizer([])[0].shape == (0, 10)
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer))(captions)[0], ids)


def test_tokenizer_json(tmp_path):
  word_level(tmp_path)
  sentence_pieces(tmp_path)  # ignored, since tokenizer.json comes first
  tokenizer = text.make_tokenizer("t5", 10, str(tmp_path))
  ids, lengths = tokenizer(["", "a red cube", "a green ball", "red and " * 20])
  assert tokenizer.vocab_size == len(WORDS) and ids.dtype == lengths.dtype == np.int32
  assert lengths.tolist() == [1, 4, 4, 10]
  assert ids[0].tolist() == [1] + [0] * 9
  assert ids[1].tolist() == [3, 4, 6, 1] + [0] * 6
  assert ids[2].tolist() == [3, 2, 7, 1] + [0] * 6
  assert ids[3].tolist() == [4, 8] * 4 + [4, 1]
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer))(["a red cube"])[0][0], ids[1])


def test_spiece_model(tmp_path):
  model = sentence_pieces(tmp_path)
  tokenizer = text.make_tokenizer("t5", 10, str(tmp_path))
  captions = ["", "a red cube", "blue " * 20]
  ids, lengths = tokenizer(captions)
  assert tokenizer.vocab_size == model.get_piece_size() and lengths[0] == 1 and lengths[2] == 10
  for row, length, caption in zip(ids, lengths, captions):
    assert row[length - 1] == 1 and not row[length:].any()
    decoded = model.decode(row[: length - 1].tolist())
    assert caption.startswith(decoded) if length == 10 else decoded == caption


def test_lone_surrogates_are_question_marks(tmp_path):
  for write in (sentence_pieces, word_level):
    write(tmp_path)  # tokenizer.json comes first once it is there
    tokenizer = text.make_tokenizer("t5", 10, str(tmp_path))
    for broken, whole in ((("a \ud800 red",), ("a ? red",)), (("\udfff",), ("?",))):
      np.testing.assert_array_equal(tokenizer(broken)[0], tokenizer(whole)[0])


@pytest.mark.parametrize("where", ["from_file", "encode_batch"])
def test_panics_of_the_tokenizers_package_are_one_line(tmp_path, monkeypatch, where):
  """They are no Exceptions."""
  tokenizers = pytest.importorskip("tokenizers")

  class PanicException(BaseException):
    pass

  def panic(*args, **kwargs):
    raise PanicException("called `Option::unwrap()` on a `None` value\nin Rust")

  word_level(tmp_path)
  model = mock.Mock(wraps=tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
  monkeypatch.setattr(
    tokenizers, "Tokenizer", mock.Mock(from_file=panic if where == "from_file" else lambda path: model)
  )
  model.encode_batch = panic
  with pytest.raises(ValueError, match=r"(tokenizer.json is not a complete|cannot encode) .*\(called .* value\)$"):
    text.make_tokenizer("t5", 10, str(tmp_path))(["red"])


def test_tokenizer_errors(tmp_path, monkeypatch):
  make = lambda path=tmp_path: text.make_tokenizer("t5", 10, str(path))
  with pytest.raises(FileNotFoundError, match="tokenizer.json or spiece.model is needed"):
    make()
  with pytest.raises(FileNotFoundError, match="no such folder: .*/none'; set text.path to a folder"):
    make(tmp_path / "none")
  for name in ("spiece.model", "tokenizer.json"):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} is not a complete") as error:
      make()
    assert "\n" not in str(error.value)
  word_level(tmp_path, ("<unk>", "a", "red"))
  with pytest.raises(ValueError, match="not the tokenizer of a T5, whose </s> is 1 and <pad> 0: here .* None and None"):
    make()
  word_level(tmp_path, ("<pad>", "</s>", "<unk>"))
  words = (tmp_path / "tokenizer.json").read_text().replace('"<unk>": 2', '"<unk>": 4294967295')
  (tmp_path / "tokenizer.json").write_text(words)
  with pytest.raises(ValueError, match="tokenizer.json has a token with the id 4294967295: at most 4194303 is read"):
    make()
  monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
  with pytest.raises(ImportError, match=r"tokenizer.json needs tokenizers: pip install 'flextok-jax\[text\]'"):
    make()
  for args, words in ((("clip", 10), "unknown text encoder 'clip'"), (("bytes", 0), "max_length=0 .* at least 1")):
    with pytest.raises(ValueError, match=words):
      text.make_tokenizer(*args)
