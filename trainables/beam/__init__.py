"""Multi-modal beam prediction on DeepSense 6G, and the rebuild of missing sensors."""
