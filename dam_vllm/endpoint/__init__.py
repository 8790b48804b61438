"""HTTP endpoint of a running server: `/dam`, its viewer, and metrics."""
