"""The documentation: the site builds offline, links resolve, and the commands it mentions exist."""

import functools
from html.parser import HTMLParser
import importlib
import importlib.util
import os
from pathlib import Path
import re
import subprocess
import sys

from absl import flags
import pytest

from flextok_jax.config import flatten, get_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
  ROOT / "README.md",
  ROOT / "CONTRIBUTING.md",
  ROOT / "launch" / "README.md",
  ROOT / "experiments" / "README.md",
  *sorted((ROOT / "docs").glob("*.md")),
]
PLACEHOLDER = re.compile(r"[A-Z]+(\.py)?(:\w+)?|path/to/.*|…|\.\.\.")  # NAME, FILE, X.py
SHARED_FLAGS = {"help", "helpfull", "verbosity"}  # absl's

read = lambda path: path.read_text(encoding="utf-8")
document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def code(text: str) -> list[str]:
  """Returns fenced blocks, with continuation lines joined, and code spans."""
  blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
  prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
  spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]
  return [re.sub(r"\s*\\\n\s*", " ", block) for block in blocks] + spans


def commands(text: str) -> list[tuple[str, str]]:
  """Returns (module, rest of the line) for every `python -m flextok_jax.X ...` and `python -m experiments.X ...`."""
  found = []
  for part in code(text):
    for line in part.splitlines():
      for call in re.split(r"(?=python -m )", line):
        if match := re.match(r"python -m ((?:flextok_jax|experiments)\.[\w.]+)(.*)", call):
          found.append((match[1], re.split(r" #| && | \| |;", match[2])[0]))
  return found


@functools.cache
def flag_names(module: str) -> set[str]:
  """Returns the names of a command's flags, from its define_flags and from its source."""
  loaded, values = importlib.import_module(module), flags.FlagValues()
  if hasattr(loaded, "define_flags"):
    loaded.define_flags(values)
  source = Path(loaded.__file__).read_text(encoding="utf-8")
  names = set(values) | set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
  names |= set(re.findall(r'add_argument\("--(\w+)"', source))
  names |= {"config", "print_config"} if "define_config_flag(" in source else set()
  return names | ({"data"} if "define_data_flag(" in source else set())


@pytest.fixture(scope="module")
def fields() -> set[str]:
  """Returns the dotted names of all config fields and their groups."""
  names = set(flatten(get_config()))
  return names | {name.rsplit(".", i)[0] for name in names for i in range(1, name.count(".") + 1)}


def test_readme_is_short():
  assert len((ROOT / "README.md").read_bytes()) <= 10_000


@document
def test_links_resolve(path):
  text = re.sub(r"^ *```.*?^ *```", "", read(path), flags=re.MULTILINE | re.DOTALL)
  links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))
  for link in links:
    if re.match(r"https?://|mailto:", link):
      continue
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    assert target.is_relative_to(ROOT) and target.exists(), link
    if anchor:
      headings = re.findall(r"^#+ (.+)$", read(target), re.MULTILINE)
      slugs = [re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings]
      assert anchor in slugs, link


@document
def test_commands_exist_with_their_flags(path, fields):
  text = read(path)
  for module, rest in commands(text):
    if module.endswith(".NAME"):
      continue
    file = ROOT / (module.replace(".", "/") + ".py")
    assert file.exists(), module
    given = re.findall(r"--([A-Za-z][\w.]*)", rest)
    known = flag_names(module)
    for name in given:
      name = "config" if name.startswith("config.") else name
      assert name in known | SHARED_FLAGS, f"{module} --{name}"
  for name in re.findall(r"--config\.([\w.]+)", text):
    assert name in fields or name == "a.b", f"--config.{name}"


@document
def test_configs_exist(path):
  names = re.findall(r"--config=([^\s`\"'\])|;]+)", read(path))
  names += re.findall(r"\bconfigs/\w+\.py(?::\w+)?", read(path))
  for name in names:
    file, _, argument = name.removeprefix("configs/").partition(":")
    file = file.removesuffix(".py")
    if PLACEHOLDER.fullmatch(name.removeprefix("configs/")) or name.endswith("config.json"):
      continue
    assert (ROOT / "configs" / f"{file}.py").exists(), name
    module = importlib.import_module(f"configs.{file}")
    if argument:
      module.get_config(argument)


def test_table_of_configs(fields):
  """The table lists exactly the configs that exist."""
  text = read(ROOT / "docs" / "commands.md")
  table = text[text.index("| config | what | size |") :]
  names = re.findall(r"`([a-z]\w*(?::\w+)?)`", " ".join(row.split("|")[1] for row in table.splitlines() if "|" in row))
  for name in names:
    file, _, argument = name.partition(":")
    importlib.import_module(f"configs.{file}").get_config(*([argument] if argument else []))
  files = {path.stem for path in (ROOT / "configs").glob("[a-z]*.py")}
  assert {name.partition(":")[0] for name in names} == files


@document
def test_fields_and_files_exist(path, fields):
  """Code spans that look like config fields or repository files refer to existing ones."""
  groups = {name.partition(".")[0] for name in fields if "." in name}
  for span in re.findall(r"`([^`\n]+)`", read(path)):
    if match := re.fullmatch(r"(?:config\.)?((\w+)\.[\w.]+?)(?:=.*)?", span):
      if match[2] in groups and not re.search(r"\.(py|md|json|png|jsonl)$", match[1]):
        assert match[1] in fields, span
    elif re.fullmatch(r"(flextok_jax|configs|docs|experiments|launch|tests)/[\w./]*", span):
      assert (ROOT / span).exists(), span


def test_experiments_are_listed():
  text = read(ROOT / "experiments" / "README.md")
  scripts = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}
  assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == scripts


class Requests(HTMLParser):
  """Collects the URLs that a browser fetches from other hosts when it opens a page, except ordinary links."""

  def __init__(self):
    super().__init__()
    self.found = []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    urls = [attrs.get("src"), attrs.get("srcset"), attrs.get("poster"), attrs.get("data")]
    if tag == "link" and attrs.get("rel") not in ("canonical", "next", "prev", "edit"):
      urls.append(attrs.get("href"))
    self.found += [url for url in urls if url and re.match(r"(https?:)?//", url)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
  """Returns the folder of the built site."""
  for name in ("mkdocs", "material", "mkdocstrings"):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f"{name} is not installed: pip install 'flextok-jax[docs]'")
  folder = tmp_path_factory.mktemp("site")
  # A proxy that nobody listens on: any network access fails.
  env = os.environ | {"NO_MKDOCS_2_WARNING": "1"} | dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  return folder


def test_site_makes_no_request_to_other_hosts(site):
  pages = list(site.rglob("*.html"))
  assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
  for page in pages:
    parser = Requests()
    parser.feed(read(page))
    assert parser.found == [], page
  for sheet in site.rglob("*.css"):
    assert re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)]*", read(sheet)) == [], sheet


def test_site_has_the_api(site):
  page = read(site / "api" / "index.html")
  names = ["load", "load_ar", "tokenizer.FlexTok", "ARGenerator.generate", "ops.fsq", "ops.guidance"]
  assert [name for name in names if not re.search(rf'id="flextok_jax\.[\w.]*{name}', page)] == []
