"""tinydrug from a checkout: `python cli.py` is the command `tinydrug`."""

import sys

from tinydrug.cli import main

if __name__ == "__main__":
    sys.exit(main())
