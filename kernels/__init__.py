"""Pallas and XLA kernels, one folder an op. Imported as `blockjax.kernels`."""
