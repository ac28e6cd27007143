#!/bin/sh
# In the stage `base`: remove what a running container must not have.
set -eu
# pip and its own installer, where the base image brings them.
if python3 -c 'import pip' 2>/dev/null; then
    python3 -m pip uninstall --quiet --yes --root-user-action ignore setuptools wheel pip
fi
rm -rf "$(python3 -c 'import os; print(os.path.dirname(os.__file__))')/ensurepip"
if python3 -c 'import pip' 2>/dev/null; then
    echo "the base image has a pip that pip cannot uninstall: choose one without (Debian: without python3-pip)" >&2
    exit 1
fi
# No container of ours changes its user.
find / -xdev -type f -perm /6000 -exec chmod a-s {} +
