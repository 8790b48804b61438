"""Static masks: from mean maps to kept columns and diagonals (paper, Stage 1)."""
