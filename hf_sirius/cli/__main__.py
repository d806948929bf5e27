"""`python -m hf_sirius.cli`, for `accelerate launch -m`."""

import sys

from .main import main


sys.exit(main())
