"""Faults that a run must survive, each injected into real processes."""
