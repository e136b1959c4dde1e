"""Behaviour tagging: classifies what two mice, or any tracked animals, do in every frame of a video."""
