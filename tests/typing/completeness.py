"""Are the types of every public name complete? Asks ``pyright --verifytypes``, in the environment that it runs in.

Public are the names of ``qbridge`` with all their members, and the errors. The other modules are checked by
``mypy --strict``; among them are subclasses of classes of Celery, whose types are unknown while Celery has none.
"""

from __future__ import annotations

import json
import subprocess
import sys

import qbridge


def main() -> int:
    """Print each public symbol whose type is not known and unambiguous; return their number as exit code."""
    command = ["pyright", "--verifytypes", "qbridge", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    homes = tuple(f"qbridge.{module}.{name}" for name, module in qbridge._HOMES.items())
    public = [
        symbol
        for symbol in symbols
        if symbol["name"].count(".") == 1 or any(f"{symbol['name']}.".startswith(f"{home}.") for home in homes)
    ]
    if not public:
        print(f"pyright found no symbols: {done.stdout} {done.stderr}")
        return 1
    incomplete = [symbol for symbol in public if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]]
    for symbol in incomplete:
        print(symbol["name"], *(diagnostic["message"] for diagnostic in symbol["diagnostics"]), sep="\n    ")
    print(f"{len(public) - len(incomplete)} of {len(public)} public symbols have complete types")
    return min(len(incomplete), 1)


if __name__ == "__main__":
    sys.exit(main())
