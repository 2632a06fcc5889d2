"""``python -m hf_pdecay``: the command line without its entry point."""

from __future__ import annotations

import sys

from .cli.main import main


if __name__ == "__main__":
    sys.exit(main())
