"""Says at the end how many samples there are, and lists those that are not run."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.docs.samples import pages, stories_of


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the samples of all pages."""
    samples = [sample for page in pages() for story in stories_of(page) for sample in story.samples]
    counts = Counter("not run" if sample.not_run else sample.language for sample in samples)
    terminalreporter.section("samples")
    terminalreporter.write_line(", ".join(f"{number} {kind}" for kind, number in counts.most_common()))
    for sample in samples:
        if sample.not_run:
            terminalreporter.write_line(f"not run: {sample.place}: {sample.not_run}")
