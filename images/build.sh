#!/bin/sh
# Build the images with docker, podman or buildah: build.sh [TARGET...], by default `operator trainer`.
#
# The result is qlora-TARGET:VERSION in the builder's own store, and with SYFT, dist/qlora-TARGET-VERSION.spdx.json.
#   BUILDER          docker, podman or buildah; by default the first of them that works
#   BASE_IMAGE       Debian with Python 3.11 or newer; `debootstrap` makes one without a registry (root). By default
#                    the one that the Dockerfile names, where it can be pulled, else `debootstrap`
#   TORCH_INDEX_URL  package index to take torch from, such as one with the CPU-only build
#   SSL_CERT_FILE    certificates to trust during the build
#   SYFT             the program syft, which lists what is in an image
set -eu
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
own_base=qlora-debian:bookworm

say() { echo "images: $*" >&2; }

working() {
    case $1 in
        buildah) command -v buildah >/dev/null ;;
        *) "$1" info >/dev/null 2>&1 ;;
    esac
}

first_builder() {
    for builder in docker podman buildah; do
        if working "$builder"; then
            echo "$builder"
            return
        fi
    done
    say "neither docker, podman nor buildah works here: install one (Debian: apt-get install buildah), or set BUILDER"
    exit 1
}

base_image() {
    wanted=${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}
    if [ "$wanted" != debootstrap ]; then
        if [ -n "${BASE_IMAGE:-}" ] || "$builder" pull --quiet "$wanted" >/dev/null 2>&1; then
            echo "$wanted"
            return
        fi
        say "$wanted cannot be pulled: making a base by debootstrap instead (1 to 3 minutes)"
    fi
    if [ -z "$("$builder" images --quiet "$own_base" 2>/dev/null)" ]; then
        images/base.sh "$builder" "$own_base" >&2
    fi
    echo "$own_base"
}

# As arguments in "$@", since paths may have spaces.
build() {
    target=$1
    set -- --build-arg "BASE_IMAGE=$base" --build-arg "TORCH_INDEX_URL=${TORCH_INDEX_URL:-}" \
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "CREATED=$created"
    if [ -n "${SSL_CERT_FILE:-}" ]; then
        set -- "$@" --secret "id=ca,src=$SSL_CERT_FILE"
    fi
    cache=${UV_CACHE_DIR:-$HOME/.cache/uv}
    if [ "$builder" != docker ]; then
        set -- "$@" --layers --timestamp "$SOURCE_DATE_EPOCH"
        if [ -d "$cache" ]; then
            set -- "$@" --volume "$cache:/var/cache/uv"
        fi
    fi
    "$builder" build --quiet "$@" --target "$target" --tag "qlora-$target:$version" . >/dev/null
}

list_contents() {
    mkdir -p dist
    image=qlora-$1:$version file=dist/qlora-$1-$version.spdx.json
    source=$builder:$image
    if [ "$builder" = buildah ]; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        buildah push --quiet --compression-level 1 "$image" "oci:$scratch/layout:$image"
        source=oci-dir:$scratch/layout
    fi
    "$SYFT" scan --quiet --source-name "qlora-$1" --source-version "$version" "$source" --output "spdx-json=$file.new"
    mv "$file.new" "$file"
    rm -rf "${scratch:-}"
    say "wrote $file"
}

# Needs no daemon and no privileges beyond its own.
export BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}" STORAGE_DRIVER="${STORAGE_DRIVER:-overlay}"
export DOCKER_BUILDKIT=1
# The time of every file and of the image itself: not the commit's, which would make layers anew that are the same. It is
# the earliest that a zip archive can hold.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-315532800}"
builder=${BUILDER:-$(first_builder)}
base=$(base_image)
revision=$(git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null || echo unknown)
created=$(git log -1 --format=%cI 2>/dev/null || date -u +%Y-%m-%dT%H:%M:%SZ)
[ $# -gt 0 ] || set -- operator trainer
for target; do
    say "building qlora-$target:$version with $builder on $base"
    build "$target"
    if [ -n "${SYFT:-}" ]; then
        list_contents "$target"
    fi
done
