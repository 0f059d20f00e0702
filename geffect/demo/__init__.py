"""The embedded study: a small language model that memorises, forgets, and is looked at."""
