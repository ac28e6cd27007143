#!/bin/sh
# In the stage `code`: build the wheel of /source and lay it out under /image as it is in the images.
set -eu
uv=/build/venv/bin/uv environment=/image/opt/venv
"$uv" build --quiet --offline --wheel --no-build-isolation --python /build/venv/bin/python --out-dir /wheel /source
python3 -m venv --without-pip /opt/venv
"$uv" pip install --quiet --offline --no-deps --python /opt/venv/bin/python /wheel/*.whl
site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Valid whatever the time of the source, which not every builder keeps.
# When the wheel was made, which is of no use in an image.
sed -i '/uv_cache.json/d' "$site"/qlora_operator-*.dist-info/RECORD
rm -f "$site"/qlora_operator-*.dist-info/uv_cache.json
PYTHONHASHSEED=0 /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash "$site"
mkdir -p "/image$site" "$environment/bin"
cp -a "$site/." "/image$site/"
cp -a /opt/venv/bin/qlora "$environment/bin/"
