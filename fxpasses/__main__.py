"""`python -m fxpasses`: the command line."""

import sys

from fxpasses.cli.main import main

if __name__ == "__main__":  # the demo's processes import this module again
    sys.exit(main())
