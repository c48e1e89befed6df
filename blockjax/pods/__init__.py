"""Training steps compiled for TPU pods without one: what fits, what travels, how long a step takes."""
