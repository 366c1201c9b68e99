#!/bin/bash
# Installs Limbeck with PyTorch and the packages of requirements.txt in a virtual environment: src/setup.sh [FOLDER]
# The Dockerfile runs it. Without containers, run it once in a folder that all machines share.
set -euo pipefail

folder=$(realpath --canonicalize-missing "${1:-.venv}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --no-cache-dir --disable-pip-version-check -r src/requirements.txt
"$folder/bin/limbeck" --help > /dev/null
echo "installed in $folder; activate it with: source $folder/bin/activate"
