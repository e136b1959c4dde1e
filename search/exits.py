"""The exit statuses of `launch.py`."""

EXIT_FOUND, EXIT_NOTHING, EXIT_MISTAKE, EXIT_INTERRUPTED = 0, 1, 2, 130
