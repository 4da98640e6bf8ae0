#!/usr/bin/env bash
# Set up, then run the main job on the bundled text: tokenizer, packed data, an ARM and an MDM at equal compute,
# their validation losses, curves and samples. Under 10 minutes on two CPU cores; --help lists the flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh
exec "${SMDM_VENV:-.venv}/bin/python" scripts/quickstart.py "$@"
