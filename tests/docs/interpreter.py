"""The Python prompt of a story: reads blocks from its standard input, runs them, answers one line of JSON each.

Run as a program, in the folder of the story. As at the prompt of ``python -m asyncio``, ``await`` works.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import inspect
import io
import json
import os
import sys
import traceback

_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Prompt:
    """One namespace and one event loop for a whole story."""

    def __init__(self) -> None:
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)

    def run(self, source: str, place: str, line: int, mode: str) -> None:
        tree = ast.parse(source, place, mode)
        ast.increment_lineno(tree, line - 1)
        value = eval(compile(tree, place, mode, _AWAIT), self.names)
        if inspect.iscoroutine(value):
            self.loop.run_until_complete(value)

    def block(self, source: str, place: str, line: int) -> str:
        """Run a block of code; return what went wrong, or nothing."""
        try:
            self.run(source, place, line, "exec")
        except Exception:
            return traceback.format_exc()
        return ""

    def session(self, source: str, place: str, line: int) -> str:
        """Run what is behind ``>>>`` and compare what comes out; return what went wrong, or nothing."""
        checker = doctest.OutputChecker()
        for example in doctest.DocTestParser().get_examples(source):
            said, failure = io.StringIO(), ""
            with contextlib.redirect_stdout(said):
                try:
                    self.run(example.source, place, line + example.lineno, "single")
                except Exception as error:
                    if example.exc_msg is None:
                        return traceback.format_exc()
                    failure = "".join(traceback.format_exception_only(error))
                    # what Python adds below the message is not compared
                    failure = failure if "\n" in example.exc_msg.strip() else failure.partition("\n")[0] + "\n"
            wanted, got = (example.exc_msg, failure) if example.exc_msg is not None else (example.want, said.getvalue())
            if not checker.check_output(wanted, got, _OPTIONS):
                where = f"line {line + example.lineno}: {example.source}"
                return f"{where}\nexpected:\n{wanted}\ngot:\n{got}"
        return ""


def main() -> None:
    sys.path.insert(0, os.getcwd())
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what samples print beside the comparison goes to the log
    prompt = Prompt()
    for line in sys.stdin:
        order = json.loads(line)
        run = prompt.session if order["session"] else prompt.block
        answers.write(json.dumps(run(order["code"], order["place"], order["line"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
