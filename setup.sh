#!/usr/bin/env bash
# Set up everything in a folder of its own (.venv), once; a later call finds it done and returns at once.
#
#   ./setup.sh                  what training, sampling and evaluation need
#   ./setup.sh test [loggers ...] and these extras of pyproject.toml: eval (lm-evaluation-harness), judge (MT-bench),
#                               web (the page), loggers (TensorBoard, W&B), test (the tests; holds eval, judge and web),
#                               data (corpora in shards), docs (the site), fused (flash-attn and xformers, for CUDA)
#
# PYTHON=/path/to/python chooses the Python, SMDM_VENV=/folder another place (a conda environment will do: CONDA.md).
# Options for pip, such as a package index of your own, go into pip's environment variables (PIP_INDEX_URL ...).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

case " $* " in
*" -h "* | *" --help "*)
    # The comment above, without its signs.
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' setup.sh
    exit
    ;;
esac
for extra in "$@"; do
    case $extra in
    -*)
        echo "error: $extra: no such option; ./setup.sh --help" >&2
        exit 2
        ;;
    esac
done

venv=${SMDM_VENV:-$PWD/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
stamp=$venv/smdm-installed
log=$venv/smdm-setup.log

fail() {
    echo "error: $1" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
        [ "$candidate" != "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is no Python 3.11 to 3.14"
    done
    fail "no Python 3.11 to 3.14 found; install one (python.org, your system's packages, or conda: see CONDA.md) or name it: PYTHON=/path/to/python ./setup.sh"
}

# What was installed: the requirements, and the folder that the editable install points to. Fails if the Python is gone.
fingerprint() {
    "$venv/bin/python" -c 'import hashlib, os
print(hashlib.sha256(os.getcwd().encode() + open("pyproject.toml", "rb").read()).hexdigest())' 2>/dev/null
}

make_environment() {
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        fail "$python has no venv module; on Debian and Ubuntu: sudo apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    echo "setting up $venv with $("$python" --version)"
    local said
    said=$("$python" -m venv "$venv" 2>&1) ||
        fail "could not make $venv (is the folder writable, is there space on the disk?): $(tail -n 1 <<<"$said")"
}

explain_failure() {
    if grep -qE "No space left|Errno 28" "$log"; then
        fail "the disk is full: the packages need about 3 GB without CUDA, 8 GB with it, in $venv"
    elif grep -qE "NewConnectionError|NameResolutionError|Failed to (resolve|establish)|ConnectTimeout|ReadTimeout|ConnectionError|ProxyError|Network is unreachable|Max retries" "$log"; then
        fail "the Python package index cannot be reached; check the network (or PIP_INDEX_URL) and run ./setup.sh again; details in $log"
    fi
    fail "installation failed: $(grep -E '^ *ERROR:' "$log" | tail -n 1 | sed 's/^ *ERROR: *//' || true) (details in $log)"
}

install() {
    local requirement=. quiet=--quiet
    [ -z "$extras" ] || requirement=.[$extras]
    # pip's own progress bars where somebody watches.
    [ ! -t 1 ] || quiet=
    rm -f "$stamp"
    echo "installing packages (several minutes the first time)"
    PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install $quiet -e "$requirement" 2>"$log" ||
        explain_failure
    echo "$(fingerprint) $extras" >"$stamp"
    echo "set up: $venv"
}

[ ! -d "$venv" ] || [ -w "$venv" ] || fail "$venv is not writable; choose another folder: SMDM_VENV=/folder ./setup.sh"
extras=$(IFS=,; echo "$*")
if [ -e "$venv/bin/python" ] || [ -L "$venv/bin/python" ]; then
    now=$(fingerprint) || fail "$venv is broken (its Python is gone): delete that folder and start again"
    read -r then had <<<"$(cat "$stamp" 2>/dev/null || true)" || true
    # Extras add up: what one command installed another does not take away.
    for extra in ${had//,/ }; do
        case ",$extras," in *",$extra,"*) ;; *) extras=${extras:+$extras,}$extra ;; esac
    done
    missing=
    for extra in ${extras//,/ }; do
        case ",$had," in *",$extra,"*) ;; *) missing=yes ;; esac
    done
    [ "$now" != "$then" ] || [ -n "$missing" ] || exit 0
fi
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_environment
install
