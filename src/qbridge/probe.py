"""Is the worker well that writes this file? ``python -m qbridge.probe FILE``, for platforms that run a command.

Neither the application nor Celery is imported, and nothing of the standard library that takes its time: the start of
the interpreter is most of what it costs.
"""

import json
import sys
import time

__all__ = ["fault_of", "main"]

_USAGE = "usage: python -m qbridge.probe FILE [--ready]"
_FRESH = 15.0
"""Seconds after which what the file says counts no more: a worker writes it every two seconds at least."""


def fault_of(path: str, *, ready: bool) -> str:
    """Return what is wrong with a worker, or an empty text.

    Args:
        path: of the file that it was started with (``worker.health_file``).
        ready: True to ask for more than life: that it takes tasks.
    """
    try:
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
        age = time.time() - told["at"]
        well, reason = told["ready" if ready else "live"], told["reason"]
    except FileNotFoundError:
        return f"there is no {path}: no worker was started with it"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read: {error}"
    if age > _FRESH:
        return f"the worker has not written {path} for {age:.0f} s"
    return "" if well else str(reason)


def main(words: list[str]) -> int:
    """Look, and say what is wrong.

    Args:
        words: of the command line.

    Returns:
        The exit code: 0 if the worker is well, 1 if it is not, 2 if the question is wrong.
    """
    files = [word for word in words if word != "--ready"]
    if len(files) != 1 or files[0].startswith("-"):
        sys.stderr.write(f"{_USAGE}\n")
        return 2
    fault = fault_of(files[0], ready="--ready" in words)
    if fault:
        sys.stdout.write(f"{fault}\n")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
