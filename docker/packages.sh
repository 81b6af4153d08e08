#!/bin/sh
# Install what both images take from Debian or Ubuntu. /run/ca.crt, if the build was given one, replaces the image's
# certificates while something is downloaded.
set -eu
if [ -e /run/ca.crt ]; then
    echo 'Acquire::https::CAInfo "/run/ca.crt";' > /etc/apt/apt.conf.d/99ca
fi
apt-get update -q
apt-get install -y -q --no-install-recommends ca-certificates git python3 python3-venv $(cat requirements/debian.txt)
rm -rf /var/lib/apt/lists/* /etc/apt/apt.conf.d/99ca
