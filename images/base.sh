#!/bin/sh
# Make a base image without a registry: base.sh BUILDER IMAGE
#
# Debian with Python, from the Debian mirror that debootstrap is set up for (DEBIAN_MIRROR names another). Run as
# root.
set -eu
builder=$1 image=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# shellcheck disable=SC2086  # no mirror is no argument
debootstrap --variant=minbase --include=python3,libgomp1,ca-certificates bookworm "$scratch/root" ${DEBIAN_MIRROR:-} \
    >"$scratch/log" 2>&1 || {
    tail -n 5 "$scratch/log" >&2
    echo "debootstrap failed: it needs root and a Debian mirror (DEBIAN_MIRROR)" >&2
    exit 1
}
cd "$scratch/root"
rm -rf var/cache/apt/* var/lib/apt/lists/* var/log/* usr/share/locale usr/share/man usr/share/info dev/*
# Licences stay, as Debian's own slim images have them.
find usr/share/doc -type f ! -name copyright -delete
find usr/share/doc -type d -empty -delete
# Of the machine that built it.
: >etc/resolv.conf
: >etc/hostname
tar --create --file ../root.tar --sort=name --numeric-owner .
cd ..
rm -rf root
printf 'FROM scratch\nADD root.tar /\nCMD ["python3"]\n' >Dockerfile
"$builder" build --quiet --tag "$image" .
