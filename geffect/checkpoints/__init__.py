"""Checkpoints: the gradients of models that training has left behind, replayed into a run file."""
