"""Untrusted text: plain data is parsed, everything else is refused with a one-line error."""

import json

import pytest

from flextok_jax.core.literals import parse_json, parse_literals
from tests.support.official_configs import NO_LITERALS, refused


class TestText:
  @pytest.mark.parametrize("text", NO_LITERALS, ids=lambda text: repr(text[:20]))
  def test_invalid_literals(self, text):
    refused("vae", parse_literals, {"vae": text})

  @pytest.mark.parametrize(
    "value",
    [
      {"a": [1, -2, 2.5, 1e-5, None, True, False, "it's", 'say "x"', "line\nbreak\t\\ é \x00"], "b": {}, "c": []},
      -1.5e300,
      [[[]]],
      "",
    ],
    ids=str,
  )
  def test_literals(self, value):
    assert parse_literals({"entry": f" {value!r}\n"}) == {"entry": value}
    assert parse_literals({"entry": json.dumps(value)}) == {"entry": value}

  def test_tuples_become_lists(self):
    assert parse_literals({"entry": "(1, (2,), [3,])"}) == {"entry": [1, [2], [3]]}

  @pytest.mark.parametrize("metadata", [None, 3, [], {"vae": 3}, {"vae": None}, {3: "1"}], ids=str)
  def test_invalid_metadata(self, metadata):
    refused("metadata", parse_literals, metadata)

  def test_metadata_without_configuration(self):
    assert parse_literals({"format": "pt"}) == {} == parse_literals({})

  @pytest.mark.parametrize(
    "text",
    [
      "",
      "[]",
      "3",
      "{",
      "{'a': 1}",
      '{"a": NaN}',
      '{"a": Infinity}',
      '{"a":' * 50_000,
      '{"a": 1} x',
      b"\xff",
      b"\x00",
      "[" * 400_000,
      '{"a": ' + "9" * 5000 + "}",
      '{"a": ' + "9" * 100 + "}",
      "x" * 2_000_000,
      None,
      '{"a": ' + "[" * 50 + "]" * 50 + "}",
      '{"a":\n1,,}',
      "\ud800",
    ],
    ids=lambda text: repr(text)[:20],
  )
  def test_invalid_json(self, text):
    refused("some file", parse_json, text, "some file")

  def test_json(self):
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "some file") == parse_json('\ufeff{"a": 1}', "some file") == {"a": 1}
    assert parse_json(b'{"a": [1, 2.5, null, "\xc3\xa9"]}', "some file") == {"a": [1, 2.5, None, "é"]}
