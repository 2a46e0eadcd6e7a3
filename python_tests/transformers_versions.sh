#!/bin/sh
# Runs the tests that meet transformers against several of its versions, each in a virtual
# environment of its own that is kept for the next time.
#
#   python_tests/transformers_versions.sh              5.17.0 and the newest
#   python_tests/transformers_versions.sh 5.19.0       another one
#
# LOOKAGAIN_ENVS says where the environments lie (default: ~/.cache/lookagain-envs), LOOKAGAIN_TORCH
# which torch they get (default: torch; without a GPU, torch==VERSION of a CPU build at hand).
set -eu
cd "$(dirname "$0")/.."
envs=${LOOKAGAIN_ENVS:-$HOME/.cache/lookagain-envs}
[ $# -gt 0 ] || set -- 5.17.0 newest
status=0
for version in "$@"; do
    env=$envs/transformers-$version
    wanted=transformers
    [ "$version" = newest ] || wanted="transformers==$version"
    [ -x "$env/bin/python" ] || python3 -m venv "$env"
    "$env/bin/python" -m pip install --quiet "${LOOKAGAIN_TORCH:-torch}"
    "$env/bin/python" -m pip install --quiet --upgrade "$wanted" '.[test]'
    "$env/bin/python" -c 'import torch, transformers
print("transformers", transformers.__version__, "torch", torch.__version__)'
    # Not `python -m pytest`: it would find the source tree, without the extension, first.
    grep -lE "^(from|import) (transformers|tiny_models)" python_tests/test_*.py |
        xargs "$env/bin/pytest" -q || status=1
done
exit $status
