#!/usr/bin/env bash
# Runs checks and tests in the repository's own environment:
#
#   bash launch/test.sh                        formatting, lint, types, layers, all tests, and the fast tests with each
#                                              other supported Python version that is installed
#   bash launch/test.sh tests/ops/test_fsq.py  only these tests; arguments are passed to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=env.sh
source launch/env.sh --functions

if (($#)); then
  flextok_env
  exec python -m pytest "$@"
fi

# The fast tests with each other Python version run beside everything else, one version after another.
slow=tests/models/test_golden.py
fast=(tests/core tests/ops tests/models/test_golden.py tests/weights/test_fingerprints.py tests/test_versions.py
  --deselect "$slow::test_sampling" --deselect "$slow::test_images_to_tokens"
  --deselect "$slow::test_training_loss_and_gradients")
main=$(flextok_interpreter)
other_pythons() {
  local version interpreter code=0
  for version in 3.11 3.12 3.13; do
    if [[ ${main:+$("$main" -V)} == "Python $version."* ]]; then continue; fi
    if ! interpreter=$(flextok_python "$version"); then
      echo "Python $version not found: skipping its tests"
      continue
    fi
    flextok_install "$PWD/.venv-$version" "$interpreter" packaging 'pytest>=8' 'setuptools>=77' || return 1
    echo "the fast tests with Python $version:"
    JAX_COMPILATION_CACHE_DIR=$PWD/.pytest_cache/jax-others PYTHONPATH=$PWD "$PWD/.venv-$version/bin/python" \
      -m pytest -p no:cacheprovider "${fast[@]}" || code=1
  done
  return "$code"
}
log=$(mktemp)
other_pythons >"$log" 2>&1 &
others=$!
trap 'kill "$others" 2>/dev/null || true; rm -f "$log"' EXIT

flextok_env
ruff format --check .
ruff check .
mypy
lint-imports
# Two processes; most of the time is compilation, which uses one core.
python -m pytest -n 2 --dist loadfile
code=0
wait "$others" || code=1
cat "$log"
exit "$code"
