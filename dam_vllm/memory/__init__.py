"""Which KV-cache pages no head can read any more, and what freeing them gains."""
