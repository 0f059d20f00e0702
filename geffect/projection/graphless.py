"""What is no part of a graph, though it may stand in the midst of a step."""

from collections.abc import Callable

import torch

from geffect.interrupts import put_back_after


def without_graph(body: Callable[[], None]) -> None:
    """Do what is no part of a graph; graphs are made afterwards as before, whatever is raised."""
    enabled = torch.is_grad_enabled()

    def run() -> None:
        torch.set_grad_enabled(False)
        body()

    def put_back() -> None:
        torch.set_grad_enabled(enabled)

    put_back_after(run, put_back)
