"""Questions whose answers are known, for the fit, the evaluation and the demo alike."""
