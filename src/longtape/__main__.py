"""`python -m longtape`: the command line."""

import sys

from longtape.cli import main

if __name__ == "__main__":
    sys.exit(main())
