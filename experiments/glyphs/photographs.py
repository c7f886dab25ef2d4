"""Makes a folder of photographs, for data.sources.photos.path, from two Debian packages of pinned versions.

python -m experiments.glyphs.photographs --out=DIR [--downloads=DIR]

  plasma-workspace-wallpapers 4:5.27.5-2, GPL-2+: 12 photographs
  mate-backgrounds 1.26.0-1, GPL-2+: 12 photographs

Writes DIR/train/NAME.jpg and DIR/validation/NAME.jpg, of at most 1,280 px a side, and DIR/LICENSES.txt. Four are held
out, which resemble none of the others. Needs apt-get and dpkg-deb; nothing is installed.
"""

from pathlib import Path
import subprocess

from absl import flags
from PIL import Image

from flextok_jax import cli

SIZE = 1280  # pixels of the longer side, at most
PACKAGES = {
  "plasma-workspace-wallpapers": ("4:5.27.5-2", "usr/share/wallpapers/{}/contents/images"),
  "mate-backgrounds": ("1.26.0-1", "usr/share/backgrounds/mate/nature"),
}
PHOTOGRAPHS = {
  "plasma-workspace-wallpapers": (
    *("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite"),
    *("OneStandsOut", "Path", "Volna", "summer_1am"),
  ),
  "mate-backgrounds": (
    *("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm"),
    *("TwoWings", "Wood", "YellowFlower"),
  ),
}
HELD_OUT = ("FallenLeaf", "Kite", "Dune", "LadyBird")


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("out", None, "Folder to write.", flag_values=values)
  flags.DEFINE_string("downloads", None, "Folder of the packages; default: OUT.downloads.", flag_values=values)


def unpack(package: str, downloads: Path) -> Path:
  """Returns the folder with the files of a package, which is fetched and not installed."""
  folder = downloads / package
  if not folder.exists():
    version, _ = PACKAGES[package]
    subprocess.run(["apt-get", "download", "--quiet", f"{package}={version}"], cwd=downloads, check=True)
    (archive,) = downloads.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "--extract", archive, folder], check=True)
  return folder


def main(values: flags.FlagValues):
  """Writes the photographs."""
  cli.require(values, "out")
  out = Path(values.out)
  downloads = Path(values.downloads or f"{values.out}.downloads")
  downloads.mkdir(parents=True, exist_ok=True)
  licenses = []
  for package, names in PHOTOGRAPHS.items():
    files = unpack(package, downloads)
    version, place = PACKAGES[package]
    licenses.append(f"{package} {version} (Debian), GPL-2+: {', '.join(names)}\n")
    for name in names:
      folder = files / place.format(name)
      found = folder.glob(f"{name}.jpg" if "{}" not in place else "*.*")
      largest = max((path for path in found if not path.is_symlink()), key=lambda path: path.stat().st_size)
      picture = Image.open(largest).convert("RGB")
      picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
      target = out / ("validation" if name in HELD_OUT else "train") / f"{name}.jpg"
      target.parent.mkdir(parents=True, exist_ok=True)
      picture.save(target, quality=95)
  (out / "LICENSES.txt").write_text("".join(licenses))
  print(f"wrote {sum(map(len, PHOTOGRAPHS.values()))} photographs to {out}, {len(HELD_OUT)} of them held out")


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
