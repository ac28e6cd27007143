#!/bin/sh
# In the stage `backends`: the compiler, and under /image/opt/venv those files of oneCCL and Intel MPI that the
# backends ccl and mpi are compiled from and run with; of 650 MB that is a tenth.
set -eu
cd "$(dirname "$0")"
. ./trust.sh
if [ -d /var/cache/uv ]; then export UV_CACHE_DIR=/var/cache/uv; else export UV_NO_CACHE=1; fi
include=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
# The images of Python have its headers; Debian has them in a package of their own.
if [ -e "$include/Python.h" ]; then sh packages.sh g++; else sh packages.sh g++ libpython3-dev; fi

pins=$(sed -n 's/^\(\(impi\|oneccl\|tcmlib\)[-a-z]*==[0-9.]*\).*/\1/p' backends.txt)
# shellcheck disable=SC2086  # one word each
/build/venv/bin/uv pip install --quiet --link-mode copy --no-deps --python /opt/venv/bin/python \
    --prefix /image/opt/venv --require-hashes --constraint backends.txt $pins

cd /image/opt/venv
# Kept are, of each library's names, the one that is asked for; of libfabric's providers those that need neither a
# device nor a driver's library; what MPI knows of the best algorithms over these; and every licence.
find . -type f \
    ! -path './lib/python*.dist-info/*' ! -path './share/doc/*/licens*/*' \
    ! -path './include/mpi*.h' ! -path './include/oneapi/*' ! -path './lib/ccl/cpu/lib/libccl.a' \
    ! -path './lib/libmpi.so.12' ! -path './lib/libhwloc.so.15' \
    ! -path './lib/libfabric.so.1' ! -path './lib/libtcp-fi.so' ! -path './lib/libshm-fi.so' \
    ! -path './opt/mpi/etc/tuning_*' -delete
find opt/mpi/etc -name '*_mlx*' -delete -o -name '*_psm3*' -delete -o -name '*_efa*' -delete -o -name '*_cxi*' -delete
find . -type d -empty -delete
