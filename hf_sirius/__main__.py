"""`python -m hf_sirius`, which is `hf-sirius`."""

import sys

from .cli.main import main


sys.exit(main(prog="python -m hf_sirius"))
