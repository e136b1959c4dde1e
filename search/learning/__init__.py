"""What a search learns from its trials: which settings survive, and which may be better than the best."""
