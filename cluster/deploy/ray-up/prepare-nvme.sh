#!/usr/bin/env bash
# Mounts an instance's local NVMe drives at /nvme, striped if there are several. Safe to run again. Takes only whole
# drives of a cloud's local storage that have neither partitions nor a file system: what is on them is nobody's.
set -euo pipefail

mountpoint -q /nvme && exit 0
drives=()
for drive in /dev/disk/by-id/nvme-Amazon_EC2_NVMe_Instance_Storage_* /dev/disk/by-id/google-local-nvme-ssd-*; do
    [[ -e $drive && $drive != *-part* && $drive != *_[0-9] ]] || continue
    device=$(readlink -f "$drive")
    if [[ -n $(lsblk --noheadings --output FSTYPE,PTTYPE "$device" | tr -d '[:space:]') ]]; then
        echo "$device is in use: left as it is" >&2
        continue
    fi
    drives+=("$device")
done
mapfile -t drives < <(printf '%s\n' ${drives[@]+"${drives[@]}"} | sort -u)
if [[ -z ${drives[0]:-} ]]; then
    echo "this machine has no unused local NVMe drive" >&2
    exit 1
fi
target=${drives[0]}
if ((${#drives[@]} > 1)); then
    target=/dev/md/headrace
    sudo mdadm --create "$target" --level=0 --raid-devices=${#drives[@]} "${drives[@]}"
fi
sudo mkfs.ext4 -q -E lazy_itable_init=1 "$target"
sudo mkdir -p /nvme
sudo mount -o noatime,nodiscard "$target" /nvme
sudo chown "$(id -u):$(id -g)" /nvme
