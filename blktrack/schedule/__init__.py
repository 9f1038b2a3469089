"""What runs `sync --all` again and again: a line for cron, or a timer of systemd."""

from blktrack.schedule import cron, timer
from blktrack.schedule.files import EVERY, File, Instance

__all__ = ["EVERY", "File", "Instance", "cron", "timer"]
