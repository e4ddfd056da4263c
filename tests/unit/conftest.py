"""What unit tests start from: the interpreters that they start are not measured, and load only what they were told."""

from __future__ import annotations

import os

# Coverage measures child processes through these; it would load sqlite3 and more into each, and some unit tests look at
# what an import loads. Worker processes are measured by the acceptance tests.
for _name in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"):
    os.environ.pop(_name, None)
