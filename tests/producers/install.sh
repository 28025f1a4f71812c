#!/bin/sh
# Installs the real producers of images that tests/test_producers.py uses, on Debian 12 or later, as root: QEMU,
# makedumpfile, gdb and the compressors. A kernel for the guest, and on Debian 12 a second, newer QEMU (of backports:
# mapped-ram, migrate file:, kdump-raw-zlib), are not installed but unpacked into a cache:
# $KSMDIST_PRODUCERS, or ~/.cache/ksmdist/producers.
set -eu
export DEBIAN_FRONTEND=noninteractive
cache=${KSMDIST_PRODUCERS:-$HOME/.cache/ksmdist/producers}
mkdir -p "$cache"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
quietly="-qq -o APT::Sandbox::User=root"

apt-get $quietly update
apt-get $quietly install -y --no-install-recommends \
  qemu-system-x86 busybox-static makedumpfile gdb gzip zstd lz4 xz-utils > /dev/null

if [ ! -e "$cache/vmlinuz" ]; then
  kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
  apt-get $quietly download "$kernel"
  dpkg -x linux-image-*.deb kernel
  module=$(find kernel -name 'qemu_fw_cfg.ko*')
  case $module in
    *.xz) xz -dc "$module" > "$cache/qemu_fw_cfg.ko" ;;
    *) cp "$module" "$cache/qemu_fw_cfg.ko" ;;
  esac
  cp kernel/boot/vmlinuz-* "$cache/vmlinuz"
fi

. /etc/os-release
if [ "$VERSION_CODENAME" = bookworm ] && [ ! -e "$cache/qemu-backports" ]; then
  # Lists of its own: backports does not become a source of this host's packages.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 'Component: main' | head -1)
  mkdir -p lists/partial
  echo "deb $mirror bookworm-backports main" > backports.list
  backports="-o Dir::Etc::SourceList=$work/backports.list -o Dir::Etc::SourceParts=- -o Dir::State::Lists=$work/lists"
  apt-get $quietly $backports update
  for package in qemu-system-x86 qemu-system-common qemu-system-data seabios; do
    apt-get $quietly $backports download "$package/bookworm-backports"
    dpkg -x "$package"_*.deb qemu
  done
  mv qemu "$cache/qemu-backports"
fi
