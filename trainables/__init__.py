"""The models and their training loop. Nothing in here knows Ray or the search engine."""
