"""python -m blktrack"""

import sys

from blktrack.cli import main

sys.exit(main())
