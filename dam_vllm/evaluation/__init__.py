"""Questions whose answers are known, and how replies are scored."""
