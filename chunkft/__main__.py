"""`python -m chunkft` is `chunkft`."""

import sys

from chunkft.cli import main

if __name__ == "__main__":
    sys.exit(main())
