"""`python -m rawaio`."""

import sys

from rawaio.cli import main

if __name__ == "__main__":
    sys.exit(main())
