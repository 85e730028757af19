"""Tests of the emulated binding, against computations that share nothing with it."""
