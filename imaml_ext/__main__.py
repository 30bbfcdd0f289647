"""The command line as `python -m imaml_ext`, which torchrun needs."""

import sys

from imaml_ext.cli import main

sys.exit(main())
