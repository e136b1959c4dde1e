"""Behaviour tagging: what two mice, or any tracked animals, do in every frame of a video."""
