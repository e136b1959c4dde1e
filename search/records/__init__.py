"""The records of a search: its folder, its trials, and the mirror of both at a URI."""
