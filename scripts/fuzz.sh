#!/usr/bin/env bash
# Fuzzes the parsers: scripts/fuzz.sh SECONDS [PARSER...]. atheris lies alone in .venv-fuzz, beside .venv and not in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=.venv-fuzz
stamp=$tools/.ready-$({ .venv/bin/python --version; cat scripts/requirements-fuzz.txt; } | sha256sum | cut -c1-16)
if [[ ! -e $stamp ]]; then
    echo "==> Setting up $tools"
    rm -rf "$tools"
    .venv/bin/python -m pip install --disable-pip-version-check --no-deps --only-binary :all: \
        --target "$tools" -r scripts/requirements-fuzz.txt || {
        echo "fuzz: atheris has packages for Linux on x86-64 and CPython up to 3.13; this is $(uname -sm), $(.venv/bin/python --version)" >&2
        exit 1
    }
    touch "$stamp"
fi
PYTHONPATH=$tools exec .venv/bin/python -m tests.fuzz.run "$@"
