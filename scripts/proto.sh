#!/usr/bin/env bash
# Generates privacy/wire/*_pb2* from proto/*.proto; with --check, says instead whether they are up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

shopt -s nullglob
protos=(proto/*.proto)
if [[ ${#protos[@]} -eq 0 ]]; then echo "proto: there is no proto/*.proto, nothing to do"; exit 0; fi

tools=.venv-proto
stamp=$tools/.ready-$(sha256sum <scripts/requirements-proto.txt | cut -c1-16)
if [[ ! -e $stamp ]]; then
    echo "==> Setting up $tools"
    .venv/bin/python -m venv --clear "$tools"
    "$tools/bin/python" -m pip install --disable-pip-version-check -r scripts/requirements-proto.txt
    touch "$stamp"
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# -Iprivacy/wire=proto: a proto imports another as "privacy/wire/other.proto", so generated imports are right.
generate=("$tools/bin/python" -m grpc_tools.protoc -Iprivacy/wire=proto
    "--plugin=protoc-gen-mypy=$tools/bin/protoc-gen-mypy" "--plugin=protoc-gen-mypy_grpc=$tools/bin/protoc-gen-mypy_grpc")
"${generate[@]}" "--python_out=$scratch" "--mypy_out=quiet:$scratch" "${protos[@]}"
mapfile -t services < <(grep -lE '^service ' "${protos[@]}" || true)
if [[ ${#services[@]} -gt 0 ]]; then
    "${generate[@]}" "--grpc_python_out=$scratch" "--mypy_grpc_out=quiet:$scratch" "${services[@]}"
fi

if [[ ${1:-} == --check ]]; then
    mkdir "$scratch/committed"
    committed=(privacy/wire/*_pb2*)
    if [[ ${#committed[@]} -gt 0 ]]; then cp "${committed[@]}" "$scratch/committed"; fi
    diff -rq "$scratch/committed" "$scratch/privacy/wire" || {
        echo "proto: privacy/wire is not what proto/*.proto generates; run make proto and commit the result" >&2
        exit 1
    }
else
    rm -f privacy/wire/*_pb2*
    cp "$scratch"/privacy/wire/*_pb2* privacy/wire/
    echo "proto: wrote $(cd "$scratch/privacy/wire" && echo *_pb2*) to privacy/wire"
fi
