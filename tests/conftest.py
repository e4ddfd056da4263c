"""What every test starts from: an environment without settings, and reproducible generated examples."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Under "ci" the same examples each time: a red run can be repeated, and a green one says what it said before.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI", "").lower() in {"1", "true", "yes"} else "dev")

# A developer's own settings are not the tests' (QBRIDGE_TEST_* name servers, and stay).
for _name in list(os.environ):
    if _name.startswith(("QBRIDGE_", "CELERY_")) and not _name.startswith("QBRIDGE_TEST_"):
        del os.environ[_name]
