"""Slow float64 NumPy versions of the library, written from the equations alone."""
