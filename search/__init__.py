"""The search engine: knows Ray and Optuna, and nothing of any model."""
