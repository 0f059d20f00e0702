"""Run files that are damaged in every way that chance finds: each is read right, or refused."""
