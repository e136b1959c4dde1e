"""Multi-modal beam prediction on DeepSense 6G, and the rebuild of a missing sensor."""
