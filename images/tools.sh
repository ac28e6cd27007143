#!/bin/sh
# In the stage `tools`: install uv, and with it what builds our wheel, each with its locked hash.
set -eu
here=$(dirname "$0")
. "$here/trust.sh"
# Debian has pip's own installer in a package of its own.
python3 -c 'import ensurepip' 2>/dev/null || sh "$here/packages.sh" python3-venv
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps \
    --require-hashes -r "$here/uv.txt"
pin() { sed -n "s/^\($1==[^ ;]*\).*/\1/p" "$here/dev.txt"; }
"$here/venv/bin/uv" pip install --quiet --no-cache --python "$here/venv/bin/python" --require-hashes \
    --constraint "$here/dev.txt" "$(pin hatchling)" "$(pin editables)"
