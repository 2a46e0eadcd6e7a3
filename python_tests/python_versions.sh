#!/bin/sh
# Builds the package for other Pythons and tests it there, each in a virtual environment that is
# kept for the next time.
#
#   python_tests/python_versions.sh python3.10 python3.13
#
# Without LOOKAGAIN_TORCH only what needs no torch runs: the build, the kernels on plain arrays, the
# template. LOOKAGAIN_TORCH=torch (or torch==VERSION) installs that torch, and runs all tests.
# LOOKAGAIN_ENVS says where the environments lie (default: ~/.cache/lookagain-envs).
set -eu
cd "$(dirname "$0")/.."
envs=${LOOKAGAIN_ENVS:-$HOME/.cache/lookagain-envs}
status=0
for python in "$@"; do
    env=$envs/python-$("$python" -c 'import platform; print(platform.python_version())')
    [ -x "$env/bin/python" ] || "$python" -m venv "$env"
    if [ -n "${LOOKAGAIN_TORCH:-}" ]; then
        "$env/bin/python" -m pip install --quiet "$LOOKAGAIN_TORCH"
        "$env/bin/python" -m pip install --quiet '.[test]'
        set -- python_tests
    else
        "$env/bin/python" -m pip install --quiet numpy pytest pytest-timeout
        "$env/bin/python" -m pip install --quiet --no-deps .
        # conftest.py imports torch.
        set -- --noconftest python_tests/test_without_torch.py python_tests/test_template.py
    fi
    "$env/bin/python" --version
    # Not `python -m pytest`: it would find the source tree, without the extension, first.
    "$env/bin/pytest" -q "$@" || status=1
done
exit $status
