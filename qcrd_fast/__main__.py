"""`python -m qcrd_fast`: the same as the command qcrd-fast."""

import sys

from qcrd_fast.cli.main import entry

sys.exit(entry())
