"""``python -m cpd.cli`` is ``cpd``."""

import sys

from cpd.cli import main

if __name__ == "__main__":
    sys.exit(main())
