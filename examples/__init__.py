"""Runnable examples; installed as `orthonorm.examples`."""
