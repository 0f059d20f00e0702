"""What it costs to record a step, beside the same passes and the same optimizer without it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from geffect import Recorder
from geffect.losses import Loss
from geffect.objectives import SharedForward, WeightedGradientAscent, nll

from .bars import Bar, Row
from .memory import gradient_bytes, peak_bytes, peak_gradients
from .rounds import Load, Ratio, ratio
from .workload import Workload

Losses = Mapping[str, Loss]


def difference(workload: Workload) -> Losses:
    """The two gradients of GradDiff, whose objective costs no pass of its own."""
    forget, retain = (nll(workload.model, workload.pair[side]) for side in ("forget", "retain"))
    return {"objective": {"forget": -1.0, "retain": 1.0}, "forget": forget, "retain": retain}


def plain_difference(workload: Workload) -> None:
    """Two forwards, and a backward through both."""
    losses = difference(workload)
    (losses["retain"] - losses["forget"]).backward()


def weighted(workload: Workload) -> Losses:
    """The three gradients of WGA, two of which share a forward."""
    shared = SharedForward(workload.model)
    return {
        "objective": WeightedGradientAscent()(shared, workload.pair),
        "forget": nll(shared, workload.pair["forget"]),
        "retain": nll(shared, workload.pair["retain"]),
    }


def functions_of_weighted(workload: Workload) -> dict[str, Callable[[], Tensor]]:
    """The same, one asked after the other."""
    shared = SharedForward(workload.model)
    return {
        "objective": lambda: WeightedGradientAscent()(shared, workload.pair),
        "forget": lambda: nll(shared, workload.pair["forget"]),
        "retain": lambda: nll(shared, workload.pair["retain"]),
    }


def plain_weighted(workload: Workload) -> None:
    """Two forwards, three backwards."""
    losses = weighted(workload)
    losses["objective"].backward(retain_graph=True)
    losses["forget"].backward()
    losses["retain"].backward()


def rows(workload: Workload, folder: Path) -> Iterator[Row]:
    """Time and memory of recording two and three gradients, and the time of keeping three."""
    yield from time_of_two(workload, folder)
    yield from time_of_three(workload, folder)
    yield from extra_memory(workload, folder)
    yield memory_of_functions(workload, folder)


def time_of_two(workload: Workload, folder: Path) -> Iterator[Row]:
    """A recorded step of GradDiff."""
    stepping = stepping_of(workload)
    with Recorder(workload.model, folder / "two.h5") as recorder:
        seconds = workload.seconds(
            {
                "plain": stepping(lambda: plain_difference(workload)),
                "recorded": stepping(lambda: recorder.backward(**difference(workload))),
            }
        )
    yield Row(
        "two gradients: recorded step / step",
        ratio(seconds["recorded"], seconds["plain"]),
        Bar(1.03),
    )


def time_of_three(workload: Workload, folder: Path) -> Iterator[Row]:
    """A recorded step of WGA, with and without its gradients."""
    stepping = stepping_of(workload)

    def keep() -> None:
        # A run of its own in each round: it is not closed before everything is in the file.
        path = folder / "kept.h5"
        with Recorder(workload.model, path, store="bf16", overwrite=True) as recorder:
            stepping(lambda: recorder.backward(**weighted(workload)))()

    with Recorder(workload.model, folder / "three.h5") as recorder:
        seconds = workload.seconds(
            {
                "plain": stepping(lambda: plain_weighted(workload)),
                "recorded": stepping(lambda: recorder.backward(**weighted(workload))),
                "kept": keep,
            }
        )
    yield Row(
        "three gradients: recorded step / same passes",
        ratio(seconds["recorded"], seconds["plain"]),
        Bar(1.04),
    )
    yield Row(
        "three gradients kept in bf16: recorded step / same passes",
        ratio(seconds["kept"], seconds["plain"]),
        Bar(1.08),
    )


def extra_memory(workload: Workload, folder: Path) -> Iterator[Row]:
    """Gradients that are alive at once, beyond those of the same passes without recording."""
    small = workload.minute()
    two = _extra(small, folder / "memory of two.h5", difference, plain_difference)
    yield Row("two gradients: extra memory of recording / one gradient", two, Bar(0.0))
    three = _extra(small, folder / "memory of three.h5", weighted, plain_weighted)
    yield Row("three gradients: extra memory of recording / one gradient", three, Bar(1.0))


def memory_of_functions(workload: Workload, folder: Path) -> Row:
    """All memory at peak where three losses are functions, and that of the largest alone.

    Of the three gradients that are compared, two are there beside the last loss.
    """
    alone = max(
        _peak(workload, lambda name=name: functions_of_weighted(workload)[name]().backward())  # type: ignore[misc]
        for name in functions_of_weighted(workload)
    )
    with Recorder(workload.model, folder / "memory of functions.h5") as recorder:
        together = _peak(workload, lambda: recorder.backward(**functions_of_weighted(workload)))
    return Row(
        "three losses as functions: memory at peak / the largest alone and two gradients",
        Ratio(together / (alone + 2 * gradient_bytes(workload))),
        Bar(1.02),
    )


def _peak(workload: Workload, load: Load) -> int:
    peak = peak_bytes(load)
    workload.model.zero_grad()
    return peak


def _extra(
    workload: Workload,
    path: Path,
    losses_of: Callable[[Workload], Losses],
    plain: Callable[[Workload], None],
) -> Ratio:
    with Recorder(workload.model, path) as recorder:
        beside = peak_gradients(workload, lambda: plain(workload))
        workload.model.zero_grad()
        whole = peak_gradients(workload, lambda: recorder.backward(**losses_of(workload)))
        workload.model.zero_grad()
    return Ratio((whole - beside) / gradient_bytes(workload))


def stepping_of(workload: Workload) -> Callable[[Load], Load]:
    """What makes a step of a backward pass, all with one optimizer."""
    optimizer = workload.optimizer()

    def stepping(backward: Load) -> Load:
        def step() -> None:
            backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return stepping
