"""Untrusted text: plain data is parsed, everything else is refused with a one-line error."""

import json

import pytest

from flextok_jax.core.literals import parse_json, parse_literals, parse_yaml
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


def repeated(item: str, kind: str) -> str:
  """Returns YAML of a few hundred characters whose last entry repeats the first 8^12 times."""
  lines = [f"x0: &x0 {item}"]
  lines += [f"x{i}: &x{i} {kind % ', '.join([f'*x{i - 1}'] * 8)}" for i in range(1, 13)]
  return "\n".join(lines)


class TestYaml:
  def test_mappings(self):
    text = "a: &a {b: 1, c: [1, 2.5, x]}\nd: {<<: *a, b: 2}\ne: *a\nf: !!int '3'"
    a = {"b": 1, "c": [1, 2.5, "x"]}
    assert parse_yaml(text, "file") == {"a": a, "d": a | {"b": 2}, "e": a, "f": 3}
    assert parse_json(json.dumps(a), "file") == a

  @pytest.mark.parametrize(
    "text, words",
    [
      *[(f"a: {tag}", "tag") for tag in ("!!bool x", '!!int ""', "!!timestamp x", '!!float ""')],
      *[
        (f"a: {text}", "not plain") for text in ("!!binary x", "!!int x", "!!set {b}", "2020-13-45", "!x y", "=", "<<")
      ],
      ("a: !!python/object/apply:os.system [ls]", "not plain"),
      ("a: 1\n---\nb: 2", "single document"),
      ("{[1]: 2}", "unhashable"),
      ("1: 2", "a key must be text"),
      ("a: \ud800", "not plain"),
      ("a: 1" + ":1" * 20_000, "too large"),
      ("a: " + "9" * 90_000, "not plain"),
      ("a: " + "[" * 500, "recursion"),
      ("- " * 40_000, "recursion"),
      ("x" * 200_000, "more than 100000 characters"),
      ("", "mapping"),
      ("[1]", "mapping"),
      *[(text, "more than 20000 values") for text in ("a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}")],
      (repeated("{y: 1}", "{<<: [%s]}"), "more than 20000 values"),
      (repeated("[1, 2]", "[%s]"), "more than 20000 values"),
    ],
    ids=lambda text: repr(text[:20]),
  )
  def test_anything_else_is_refused(self, text, words):
    with pytest.raises(ValueError, match=f"^file: .*{words}") as error:
      parse_yaml(text, "file")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300
