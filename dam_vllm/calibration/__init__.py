"""Calibration: from texts and a frozen model to a mask file (paper, Stage 1)."""
