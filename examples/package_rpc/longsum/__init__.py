"""A package whose work is done by workers."""
