"""What every test starts from: an environment without settings, signals as in a terminal, reproducible examples."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# Under "ci" the same examples each time: a red run can be repeated, and a green one says what it said before.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI", "").lower() in {"1", "true", "yes"} else "dev")

# A developer's own settings are not the tests' (QBRIDGE_TEST_* name servers, and stay).
for _name in list(os.environ):
    if _name.startswith(("QBRIDGE_", "CELERY_")) and not _name.startswith("QBRIDGE_TEST_"):
        del os.environ[_name]

# A shell starts what it runs in the background with SIGINT ignored, which every child inherits: Ctrl-C would mean
# nothing to the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
