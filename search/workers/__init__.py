"""What runs in the processes of a worker group, and how a slot communicates with them."""
