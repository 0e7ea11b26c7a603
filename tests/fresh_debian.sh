#!/usr/bin/env bash
# A rig from nothing: a fresh Debian 12, spiked installed in it from a wheel, then init, doctor, service with its kernels
# compiled, simulator in, live units, stop, sorted session, under Debian's own systemd (see systemd_box.py).
# Not part of the test suite: it takes ten minutes, 3 GB of disk and root.
#
#   apt install mmdebstrap; tests/fresh_debian.sh /var/tmp/fresh [debian.sources]
#
# The installed system is kept in FOLDER/root and used again; what runs in it is thrown away.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?say where: tests/fresh_debian.sh FOLDER}
python=${PYTHON:-$here/.venv/bin/python}
mkdir -p "$folder/wheels"
cd "$folder"
if [ ! -e root/opt/spiked/bin/spiked ]; then
    # packages, with this computer's own settings for where they come from
    "$python" -m pip wheel --quiet --no-deps --wheel-dir wheels "$here"
    "$python" -m pip download --quiet --dest wheels --constraint "$here/requirements.lock" \
        "$(grep '^torch==' "$here/requirements.lock")" "$(ls "$PWD"/wheels/spiked-*.whl)[offline]"
    [ -e debian.tar ] || mmdebstrap --variant=minbase --include=systemd-sysv,dbus,python3,python3-venv,iproute2,procps,ca-certificates \
        bookworm debian.tar ${2:+"$2"}
    mkdir -p root && tar -C root -xf debian.tar
    cp -r wheels root/wheels
    chroot root sh -ec '
        python3 -m venv /opt/spiked
        /opt/spiked/bin/pip install --quiet --no-index --find-links /wheels "spiked[offline]"
        ln -s /opt/spiked/bin/spiked /usr/local/bin/spiked
        rm -rf /wheels; mkdir /data'
fi
exec "$python" "$here/tests/fresh_debian.py" "$PWD/root"
