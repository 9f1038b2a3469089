"""blktrack: replicate live Linux block devices by the sector ranges that changed."""

__version__ = "0.1.0"
