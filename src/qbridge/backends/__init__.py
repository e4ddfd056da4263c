"""One room per service; ``base`` holds what every room offers. Rooms do not import one another."""
