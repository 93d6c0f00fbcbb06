"""`python -m fastmto` is the command `fastmto`."""

import sys

from .cli import main

sys.exit(main())
