#!/usr/bin/env bash
# Collects veilsum and everything it needs, in the pinned versions, in a folder that can be installed from without a network.
set -euo pipefail
folder=${1:?usage: scripts/wheels.sh FOLDER [EXTRAS]}
extras=${2:+[$2]}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# An environment of its own: what is installed here does not decide what is collected.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip wheel --quiet -c constraints.txt --wheel-dir "$folder" ".$extras"
printf '%s wheels in %s; install them with:\n  pip install --no-index --find-links %s "veilsum%s"\n' \
    "$(find "$folder" -name '*.whl' | wc -l)" "$folder" "$folder" "$extras"
