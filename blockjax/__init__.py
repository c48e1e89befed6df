"""blockjax: attention, recurrence and depth in blocks, for JAX on TPU and GPU."""
