#!/usr/bin/env bash
# Makes .venv-peers, the environment of what `make bench` compares with, from scripts/requirements-peers.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME
peers=.venv-peers
stamp=$peers/.ready-$(sha256sum <scripts/requirements-peers.txt | cut -c1-16)
if [[ -e $stamp ]]; then exit 0; fi
python=.venv/bin/python
if [[ ! -x $python ]]; then python=${PYTHON:-python3}; fi
echo "==> Setting up $peers: the published wheels that the benchmarks compare with"
"$python" -m venv --clear "$peers"
"$peers/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps -r scripts/requirements-peers.txt
touch "$stamp"
