#!/usr/bin/env bash
# Pulls the default model into FORGE_HOME, if it is not there, and prints the path of its file.
#
#   tests/default_model.sh PROGRAM
set -euo pipefail
program="${1:?the forgectl to pull with}"
: "${FORGE_HOME:?where the model shall live}"
"$program" pull smollm2:135m >&2
"$program" show smollm2:135m -o json | python3 -c '
import json, pathlib, sys
path = pathlib.Path(json.load(sys.stdin)["status"]["path"])
print(path if path.is_file() else next(path.glob("*.gguf")))'
