"""`python -m spiked_client.web`: the page's server as a program, alone or as the daemon's child."""

from __future__ import annotations

import sys

from spiked_client.web.command import main

if __name__ == "__main__":
    sys.exit(main())
