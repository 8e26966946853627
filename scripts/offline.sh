#!/usr/bin/env bash
# Shows that the folder of scripts/wheels.sh is enough: installs from it in a network namespace that has no network.
# usage: scripts/offline.sh [EXTRAS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}
wheels=build/wheels
rm -rf "$wheels" build/offline
scripts/wheels.sh "$wheels" ${extras:+"$extras"}
unshare --map-root-user --net bash -euo pipefail -c '
    ! getent hosts pypi.org >/dev/null
    "${PYTHON:-python3}" -m venv build/offline
    build/offline/bin/pip install --quiet --no-index --find-links "$1" "veilsum$2"
    cd build/offline
    for command in veilsum-coordinator veilsum-participant veilsum-audit; do bin/$command version; done
    { bin/veilsum-coordinator doctor || true; } | grep "^ok    versions:"  # it fails: there is no coordinator here
' offline "$wheels" "${extras:+[$extras]}"
