"""`python -m flows.cli` is the `puzzle` command."""

import sys

from flows.cli.main import main

sys.exit(main())
