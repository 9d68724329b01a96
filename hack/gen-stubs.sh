#!/bin/sh
# Generates the gRPC stubs from the .proto files below operator/sandkeeper/wire. Import paths start with
# `sandkeeper/wire/`, or protoc would emit `from types import ...` and meet the standard library's.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
out="${1:-operator}"
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -I operator \
    --python_out="$out" --mypy_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" \
    operator/sandkeeper/wire/*.proto operator/sandkeeper/wire/containerd/*.proto
