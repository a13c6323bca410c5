"""`python -m peft_locft.cli` is `locft`."""

import sys

from .commands import main

sys.exit(main())
