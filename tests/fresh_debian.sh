#!/usr/bin/env bash
# A rig from nothing: a fresh Debian 12 in a virtual machine, spiked installed as the README says, init, doctor, service,
# simulator in, stop, sorted session. Not part of the test suite: it takes 20 minutes, 8 GB of disk, KVM and root.
# The image is kept in FOLDER and used again; what the machine writes is thrown away.
#
#   apt install qemu-system-x86 mmdebstrap; tests/fresh_debian.sh /var/tmp/fresh
#
# Its last line is PASSED or FAILED; FOLDER/console.log has everything.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?say where: tests/fresh_debian.sh FOLDER}
python=${PYTHON:-$here/.venv/bin/python}
mkdir -p "$folder/wheels"
cd "$folder"

if [ ! -e disk.img ]; then
    # packages, with the host's own settings for where they come from
    "$python" -m pip wheel --quiet --no-deps --wheel-dir wheels "$here"
    "$python" -m pip download --quiet --dest wheels --constraint "$here/requirements.lock" \
        "$(grep '^torch==' "$here/requirements.lock")" "$(ls "$PWD"/wheels/spiked-*.whl)[offline]" pip setuptools wheel
    [ -e debian.tar ] || mmdebstrap --variant=minbase --include=systemd-sysv,udev,dbus,python3,python3-venv,linux-image-cloud-amd64,iproute2,procps,kmod,ca-certificates,initramfs-tools \
        bookworm debian.tar ${DEBIAN_SOURCES:+"$DEBIAN_SOURCES"}
    mkdir -p root && tar -C root -xf debian.tar
    cp -r wheels root/wheels
    chroot root sh -ec '
        python3 -m venv /opt/spiked
        /opt/spiked/bin/pip install --quiet --no-index --find-links /wheels "spiked[offline]"
        ln -s /opt/spiked/bin/spiked /usr/local/bin/spiked
        rm -rf /wheels; echo rig > /etc/hostname; mkdir /data'
    cat > root/etc/systemd/system/fresh.service <<'UNIT'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/fresh
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
TimeoutStartSec=infinity
[Install]
WantedBy=default.target
UNIT
    chroot root systemctl enable --quiet fresh.service
    echo '/dev/vda / ext4 defaults 0 1' > root/etc/fstab
    kernel=$(ls root/boot/vmlinuz-* | tail -1) && cp "$kernel" vmlinuz && cp "${kernel/vmlinuz/initrd.img}" initrd
    mke2fs -q -t ext4 -d root disk.img 8G
    rm -rf root
fi
for what in "rm /usr/local/sbin/fresh" "write $here/tests/fresh_debian_guest.sh /usr/local/sbin/fresh" "set_inode_field /usr/local/sbin/fresh mode 0100755"; do
    debugfs -w -R "$what" disk.img > debugfs.log 2>&1
done
qemu-system-x86_64 -enable-kvm -cpu host,arch-capabilities=off -smp 2 -m 6G -nographic -no-reboot -nic none -snapshot -kernel vmlinuz -initrd initrd \
    -append "root=/dev/vda rw console=ttyS0 quiet panic=-1" -drive file=disk.img,if=virtio,format=raw < /dev/null | tee console.log
grep -q '^FRESH PASSED' console.log && echo PASSED || { echo FAILED; exit 1; }
