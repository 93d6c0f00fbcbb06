"""`python -m fastmto` is the command `fastmto`."""

import sys

from .experiments.cli import main

sys.exit(main())
