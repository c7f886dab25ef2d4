#!/usr/bin/env bash
# Checks and tests in the repository's own environment:
#
#   bash launch/test.sh                        formatting, lint, types, layers, then the whole test suite
#   bash launch/test.sh tests/ops/test_fsq.py  these tests alone; arguments are pytest's
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if (($#)); then
  exec python -m pytest "$@"
fi
ruff format --check .
ruff check .
mypy
lint-imports
# Two processes, each test file in one of them: most of the time is compilation, which uses one core.
python -m pytest -n 2 --dist loadfile
