"""`python -m samescore` is the command line."""

import sys

from samescore.cli import main

if __name__ == "__main__":
    sys.exit(main())
