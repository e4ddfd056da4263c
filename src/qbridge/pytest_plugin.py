"""pytest fixtures of qbridge (filled in by the test kit)."""
