/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* bcc includes this first and takes its presence for that of a kernel source tree. */
#define CONFIG_BPF_SYSCALL 1
