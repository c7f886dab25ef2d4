#!/usr/bin/env bash
# Lints and tests in the repository's own environment: launch/test.sh [pytest's arguments].
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

python -m ruff check .
# Two processes, a file of tests in one of them: most of the time goes into compiling, which takes one core.
python -m pytest -q -n 2 --dist loadfile tests "$@"
