"""``qbridge demo``: the whole story in one command, on a real worker process."""
