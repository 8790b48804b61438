"""Trains the demo model from nothing, on data made here."""
