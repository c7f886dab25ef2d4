#!/usr/bin/env bash
# Lints and tests in the repository's own environment: launch/test.sh [pytest's arguments].
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

python -m ruff check .
python -m pytest -q tests "$@"
