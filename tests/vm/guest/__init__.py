"""Tests that run inside a virtual machine, as root, once on each kernel: docs/vmtest.md."""
