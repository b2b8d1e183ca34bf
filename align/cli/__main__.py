"""`python -m align.cli`."""

import sys

from align.cli.dispatch import main

sys.exit(main())
