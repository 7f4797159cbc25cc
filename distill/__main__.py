"""``python -m distill`` and ``torchrun -m distill``."""

import sys

from distill.cli import main

sys.exit(main())
