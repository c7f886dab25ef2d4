#!/usr/bin/env bash
# Demonstrates the tokenizer and generators in about ten minutes on two cores:
#
#   bash launch/quickstart.sh                with pictures that ship
#   bash launch/quickstart.sh PICTURE ...    with these pictures, too
#
# Writes to the folder WORKDIR of the environment, by default runs/quickstart. Running it again overwrites the pictures of
# the pretrained models and trains in a new folder.
set -euo pipefail
work=${WORKDIR:-}
[[ -z $work || $work == /* ]] || work=$PWD/$work
pictures=()
for picture in "$@"; do
  if [[ ! -f $picture ]]; then
    echo "error: $picture is not a file: give the paths of pictures" >&2
    exit 1
  fi
  pictures+=("$(realpath "$picture")")
done
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

work=${work:-$PWD/runs/quickstart}
scratch=$work/scratch
n=1
while [[ -e $scratch ]]; do
  n=$((n + 1))
  scratch=$work/scratch-$n
done
mkdir -p "$work"
sheet=()

heading() { printf '\n=== %s ===\n\n' "$1"; }

heading "1. A tokenizer that ships, on held-out emoji and photographs: from 1 to 32 tokens"
echo "Here and below, students decode: 4 evaluations of the network per picture, where their teachers take 50"
echo "(docs/students.md)."
rm -rf "$work/held_out"
python launch/pictures.py held_out "$work/held_out"
python -m flextok_jax.evaluate --checkpoint=glyphs_student --images="$work/held_out" --out="$work/emoji"
python -m flextok_jax.evaluate --checkpoint=glyphs_student --sources=photos --num_images=16 --out="$work/photographs"
sheet+=("Held-out emoji from 1 to 32 tokens=$work/emoji/grid_folder.png")
sheet+=("Held-out photographs from 1 to 32 tokens=$work/photographs/grid_photos.png")

if ((${#pictures[@]})); then
  heading "Your pictures, from 1 to 32 tokens"
  rm -rf "$work/pictures"
  mkdir "$work/pictures"
  for i in "${!pictures[@]}"; do cp "${pictures[i]}" "$work/pictures/$((i + 1))_${pictures[i]##*/}"; done
  python -m flextok_jax.evaluate --checkpoint=glyphs_student --images="$work/pictures" --out="$work/your_pictures"
  sheet+=("Your pictures from 1 to 32 tokens=$work/your_pictures/grid_folder.png")
fi

heading "2. A generator: captions become pictures, which end when nothing is left to say"
python -m flextok_jax.sample --tokenizer=glyphs_student --checkpoint=glyphs_text --num_samples=2 --out="$work/captions" \
  --prompts="grinning face, flat;soccer ball, flat;cactus, flat;umbrella, flat"
sheet+=("Drawn from captions, from the first token to the last=$work/captions/grid.png")

heading "3. Training from scratch: the same kind of tokenizer learns handwritten digits, in two to three minutes"
python launch/pictures.py digits "$work/digits"
train=(python -m flextok_jax.train --config=digits --data="$work/digits" --workdir="$scratch")
"${train[@]}" &
training=$!
trap 'kill $training 2>/dev/null || true' EXIT
until [[ -n $(find "$scratch/checkpoints" -maxdepth 1 -name '[0-9]*' ! -name '*tmp*' 2>/dev/null) ]]; do
  if ! kill -0 $training 2>/dev/null; then wait $training; fi # ends this script if the training failed
  sleep 1
done
kill -9 $training
wait $training 2>/dev/null || true
printf '\nkilled by kill -9; the same command goes on from the newest checkpoint:\n\n'
"${train[@]}"
evals=("$scratch"/eval/*/)
sheet+=("Trained from scratch in minutes=${evals[-1]}grid_folder.png")

python launch/pictures.py sheet "$work/contact_sheet.png" "${sheet[@]}"
heading "All pictures on one sheet: $work/contact_sheet.png"
cat <<END
Curves and pictures of the training: $scratch/report.html

Next, in an environment with this package (source ${VIRTUAL_ENV}/bin/activate):

  bash launch/quickstart.sh photo.jpg     # your own picture from 1 to 32 tokens
  python -m flextok_jax.train --config=finetune:glyphs --data=FOLDER --workdir=runs/mine     # tuned to your pictures
  pip install '.[demo]' && python -m flextok_jax.demo     # all of this in the browser
END
