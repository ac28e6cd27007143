#!/bin/sh
# In the stage `backends`: compile ccl, mpi and the kernel library from /source into /image, and remove there what only the compiler reads.
set -eu
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
PYTHONPATH=/source:/image$site python -m qlora_trainer.native.build
PYTHONPATH=/source python -m qlora_trainer.kernels.build
for room in native kernels; do
    mkdir -p "/image$site/qlora_trainer/$room"
    mv "/source/qlora_trainer/$room/compiled" "/image$site/qlora_trainer/$room/"
done
cd /image/opt/venv
# oneCCL's own description stays, since the extension has it inside.
rm -rf include lib/ccl "lib/${site##*/lib/}"/impi_devel-*.dist-info
find "/image$site" -name 'oneccl_cpu-[0-9]*.dist-info' -prune -exec rm -r {} +
