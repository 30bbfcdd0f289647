"""`python -m imaml_ext`: the command line, as torchrun starts it."""

import sys

from imaml_ext.cli import main

sys.exit(main())
