"""Whether the running kernel shows every change, found by making changes to scratch devices.

The programs are the real ones, in an instance of their own that takes nothing of the user's and
leaves nothing behind. `doctor --probe` tries everything; `track` a quick part, once for a kernel.
"""
