#!/usr/bin/env bash
# Demonstrates the tokenizer and generators in about ten minutes on two cores: launch/quickstart.sh [WORKDIR]. WORKDIR
# is runs/quickstart by default. Running it again overwrites the pretrained models' images and trains in a new folder.
set -euo pipefail
work=${1:-}
[[ -z $work || $work == /* ]] || work=$PWD/$work
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

work=${work:-$PWD/runs/quickstart}
model=flextok_jax/assets/quickstart.safetensors
photos=$work/photos
scratch=$work/scratch
n=1
while [[ -e $scratch ]]; do
  n=$((n + 1))
  scratch=$work/scratch-$n
done
mkdir -p "$work" "$photos"

heading() { printf '\n=== %s ===\n\n' "$1"; }

heading "1. The pretrained tokenizer on held-out images, with 1 to 16 tokens"
python -m flextok_jax.evaluate --checkpoint=$model --sources=synthetic,photos,emoji --num_images=32 --out="$work/pretrained" |
  tee "$work/pretrained.txt"

for photo in chelsea coffee; do # not in the training data
  cp "$(python -c "from flextok_jax.data.sources.photos import photo_path; print(photo_path('skimage', '$photo.png'))")" "$photos"
done
echo
python -m flextok_jax.tokenize --checkpoint=$model --images="$photos/chelsea.png,$photos/coffee.png" \
  --out="$photos/tokens.json"
cat "$photos/tokens.json"
for count in 1 4 16; do
  python -m flextok_jax.detokenize --checkpoint=$model --tokens="$photos/tokens.json" --num_tokens=$count \
    --out="$photos/from_$count"
done

heading "2. The same model, trained from scratch on procedural scenes and photographs"
train=(python -m flextok_jax.train --config=quickstart:scratch --workdir="$scratch")
"${train[@]}"

heading "3. The same run, resumed for a few more steps"
"${train[@]}" --config.train.num_steps=275

heading "4. Pretrained generators: images of 6 classes and of captions, with 1 to 16 tokens"
echo "Decoded by a student of the tokenizer's decoder in 4 evaluations, where its teacher takes 50 (docs/students.md)."
sample=(python -m flextok_jax.sample --tokenizer=flextok_jax/assets/shapes_student.safetensors)
"${sample[@]}" --checkpoint=flextok_jax/assets/shapes_ar.safetensors --classes=0,5,9,10,11,12 --num_samples=2 \
  --out="$work/classes"
captions="a red ring on a plain white background;a yellow heart on a plain blue background"
captions+=";a black crescent and two green circles on a plain pink background"
"${sample[@]}" --checkpoint=flextok_jax/assets/shapes_ar_stop.safetensors --prompts="$captions" --num_samples=2 \
  --out="$work/captions"

heading "The pretrained tokenizer's metrics again, and the paths of all images"
cat "$work/pretrained.txt"
find "$work/classes" "$work/captions" -name '*.png' -not -name '0*' | sort
find "$photos" "$scratch" -name '*.png' | sort
echo "$scratch/report.html"

heading "What to try next, after: source .venv/bin/activate"
echo "python -m flextok_jax.demo                                   # tokens, drawing and search in a browser"
echo "python -m flextok_jax.train --config=quickstart --data=FOLDER --workdir=runs/mine  # on pictures of your own"
echo "python -m flextok_jax.train --help                           # and docs/getting-started.md"
