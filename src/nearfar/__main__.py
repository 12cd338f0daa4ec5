"""`python -m nearfar` is the command `nearfar`."""

import sys

from nearfar.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
