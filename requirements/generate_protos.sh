#!/usr/bin/env bash
# Generates the Python messages, the gRPC stubs and the types of both. Usage: generate_protos.sh BIN
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "$1")
# googleapis-common-protos carries google/api and google/rpc beside its Python modules.
site_packages=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
target=services/tidegate/v1
mkdir -p "$target"
find "$target" -name '*_pb2*' -delete
PATH="$bin:$PATH" "$bin/python" -m grpc_tools.protoc -I protos -I "$site_packages" \
  --python_out=services --grpc_python_out=services --mypy_out=quiet:services --mypy_grpc_out=quiet:services \
  protos/tidegate/v1/*.proto
echo '"""Generated from protos/tidegate/v1 by `make protos`."""' > "$target/__init__.py"
echo "generated $(ls "$target"/*_pb2.py | wc -l) files of messages and their stubs in $target" >&2
