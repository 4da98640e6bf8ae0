#!/usr/bin/env bash
# Set up, then lint, format and type checks and the tests. Arguments go to pytest: ./test.sh -k schedule; ./test.sh -m slow; ./test.sh -m gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh test
bin=${SMDM_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
exec "$bin/python" -m pytest "$@"
