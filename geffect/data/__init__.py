"""Data: rows of files as scored tokens, pairs of forget and retain items, and their batches."""
