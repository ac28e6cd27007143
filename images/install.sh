#!/bin/sh
# In the stages of dependencies: install.sh LOCK... puts what these files beside it name into /opt/venv.
#
# torch comes from TORCH_INDEX_URL when that is set, by version alone: an index with another build of it has
# other hashes, and its build needs none of the CUDA libraries of the lock.
set -eu
cd "$(dirname "$0")"
. ./trust.sh
# A cache that the builder mounts; nothing of it gets into the image.
if [ -d /var/cache/uv ]; then export UV_CACHE_DIR=/var/cache/uv; else export UV_NO_CACHE=1; fi
install() {
    /build/venv/bin/uv pip install --quiet --link-mode copy --no-deps --python /opt/venv/bin/python "$@"
}
for lock in "$@"; do
    if [ "$lock" = torch.txt ] && [ -n "${TORCH_INDEX_URL:-}" ]; then
        install --index-url "$TORCH_INDEX_URL" "$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' torch.txt)"
    else
        install --require-hashes -r "$lock"
    fi
done
rm -f /opt/venv/.lock
python drop_unused.py
# Compiled now, since the containers' root is read-only; valid whatever the time of the source, which not every
# builder keeps. Not compiled are modules by the thousand that nobody imports (40 MB): typed classes of
# Kubernetes' client, and lexers of languages. A few packages bring templates that are no Python: hence `|| true`.
# One after another: what a file's bytecode looks like depends on those compiled before it in the same process.
PYTHONHASHSEED=0 python -m compileall -q -j 1 --invalidation-mode unchecked-hash \
    -x '/kubernetes/aio/client/(models|api)/[^_]|/pygments/lexers/[^_]' /opt/venv/lib >/dev/null || true
