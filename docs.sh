#!/usr/bin/env bash
# Set up, then build the documentation as a site: build/site/index.html. Warnings (a dead link, a page that no list names) are errors.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh docs
"${SMDM_VENV:-.venv}/bin/sphinx-build" --fail-on-warning --keep-going --quiet -c docs . build/site
echo "build/site/index.html"
