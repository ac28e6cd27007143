#!/bin/sh
# Make a virtual environment from the lock files: install.sh PYTHON VENV LOCK
#
# torch comes from TORCH_INDEX_URL when that is set, by version alone: an index with another build of it
# has other hashes, and its build needs none of the CUDA libraries of the lock.
set -eu
python=$1 venv=$2 lock=$3
here=$(dirname "$0")

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# uv is pinned with the rest; it alone is installed by pip, which every Python brings.
if ! "$venv/bin/uv" --version >/dev/null 2>&1; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
        -r "$here/uv.txt"
fi
# Compiled at once: every rank of every run imports torch and transformers, 10 s from source and 4 s compiled.
install() { "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" "$@"; }
install --no-deps --require-hashes -r "$lock"
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$here/torch.txt")
    install --no-deps --index-url "$TORCH_INDEX_URL" "torch==$version"
else
    install --no-deps --require-hashes -r "$here/torch.txt"
fi
install --no-deps --require-hashes -r "$here/demo-model.txt"
install --no-deps --no-build-isolation --editable "$here/.."
