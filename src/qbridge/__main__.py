"""What does ``python -m qbridge`` do? The same as the program ``qbridge``."""

from __future__ import annotations

from qbridge.cli import main

if __name__ == "__main__":
    main()
