"""Prompts in text files."""

import pytest

from flextok_jax.inference import prompts


def test_prompts_of_a_file(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_bytes("\ufeffa café\r\n a dog\u2028in rain \n\n".encode())
  assert prompts.read_prompts(str(path)) == ["a café", "a dog\u2028in rain"]
  for data, words in (
    (b"a\n\nb", "prompt 2 of prompts_file is empty"),
    (b"\xef\xbb\xbf\r\n", "prompt 1 of prompts_file is empty"),
    ("a".encode("utf-16"), "prompts_file=.*prompts.txt is text in UTF-16"),
  ):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
      prompts.read_prompts(str(path))
