"""Boots Debian's kernels in qemu, on the root of this host, to test blktrack there: docs/vmtest.md.

kernels     which, and where each is unpacked
packages    Debian packages, downloaded and unpacked without being installed
initramfs   what a kernel needs to reach the root of the host
machine     one virtual machine: its disks, its life, its end
"""
