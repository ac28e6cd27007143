#!/bin/sh
# Install Debian packages, and leave nothing but their files and licences: packages.sh NAME...
set -eu
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "$@" >/dev/null
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/log/*
find /usr/share/doc -type f ! -name copyright -delete
find /usr/share/doc -type d -empty -delete
