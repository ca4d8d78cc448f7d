"""`python -m crysdistill` is the command `crysdistill`."""

import sys

from crysdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
