"""`python -m elign_lab` is `elign-lab`."""

import sys

from elign_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
