"""Sweeps: one config at several settings and seeds, trained, launched elsewhere and compared."""
