#!/bin/sh
# Boots a systemd as pid 1 of a host of its own, for tests/src/machine.rs. Runs as the first process of new PID, mount, network,
# cgroup, UTS and IPC namespaces; $1 is a directory for the host's own files, $2 its name, $3 the directory of this script.
#
# The machine's files are the lower layer, and nothing of the machine is written: what the host writes is above, in memory.
set -eu
at=$1 name=$2 here=$3
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs "$at"
mkdir "$at/upper" "$at/work" "$at/root"
mount -t overlay -o "lowerdir=/,upperdir=$at/upper,workdir=$at/work" overlay "$at/root"
cd "$at/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tracefs tracefs sys/kernel/tracing
# A hierarchy without v1's controllers, rooted at the cgroup namespace: as on a host that has nothing but v2.
mount -t tmpfs -o mode=0755 tmpfs sys/fs
mkdir sys/fs/cgroup sys/fs/bpf
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
# Limits that all of the machine has are not this host's to change.
for limits in fs vm; do
    mount --bind "proc/sys/$limits" "proc/sys/$limits"
    mount -o remount,bind,ro "proc/sys/$limits"
done
# Devices that are the same for everybody, and terminals of its own.
mount -t tmpfs -o mode=0755 tmpfs dev
for device in null zero full random urandom tty fuse; do
    [ -e "/dev/$device" ] || continue
    : >"dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=0755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
# No unit of the machine but those that are said here.
rm -rf usr/lib/systemd/system/*.target.wants etc/systemd/system etc/rswap var/lib/rswap opt/rswap usr/local/bin/rswap
mkdir -p etc/systemd/system run/sshd root/.ssh
cp "$here"/*.target "$here"/*.service etc/systemd/system/
cp "$at.keys/"* root/.ssh/
chmod 0700 root/.ssh
chmod 0600 root/.ssh/*
echo "$name" >etc/hostname
hostname "$name"
: >etc/machine-id
for unit in tmp.mount systemd-journald-audit.socket; do
    ln -s /dev/null "etc/systemd/system/$unit"
done
mkdir -p mnt
pivot_root . mnt
umount -l /mnt
exec env -i container=rswap-tests PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=host.target
