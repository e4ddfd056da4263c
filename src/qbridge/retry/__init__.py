"""When do we try again? The policy, its arithmetic, tenacity in and out; the only importer of tenacity."""

from qbridge.retry.policy import Retry as Retry
from qbridge.retry.policy import Where as Where

__all__ = ["Retry", "Where"]
