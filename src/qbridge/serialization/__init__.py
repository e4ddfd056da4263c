"""What crosses the wire: a function's signature as validators, arguments and results as JSON, locked or not."""
