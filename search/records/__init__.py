"""What is on record of a search: its folder, its trials, and the copy of both at a URI."""
