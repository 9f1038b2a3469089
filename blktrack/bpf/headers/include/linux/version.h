/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Only kprobe programs carry a version; layouts come from BTF. */
#define LINUX_VERSION_CODE 0
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
