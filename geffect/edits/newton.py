"""Newton's step to where training on the retain data alone would have led, its inverse by LiSSA.

"Towards Certified Unlearning for Deep Neural Networks" (ICML 2024, arXiv 2408.00920), without its
noise and its bounds; LiSSA is of arXiv 1602.03943.
"""

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from geffect.layers import trainable
from geffect.numbers import is_number, is_whole
from geffect.risk import as_batches, undisturbed
from geffect.sources import FORGET, RETAIN

from .base import Data, Edit, Outcome
from .hessian import Hessian, Vector, dot, gradient_of, norm
from .options import check_option, chosen

FAR = 0.1
"""The residual, to the length of the retain gradient, from which on it is warned of."""


@dataclass(frozen=True)
class Newton(Edit):
    """Newton: theta - H^-1 grad R_retain, H the Hessian of R_retain + damping I, by LiSSA.

    h_0 = g; h_{j+1} = h_j + g - H_j h_j / scale; H^-1 g is h / scale after the last step, with
    g = grad R_retain and H_j the Hessian on a batch that is drawn anew, the more often the more
    answer tokens it has. It ends at H^-1 g where the eigenvalues of H are between 0 and 2 scale.

    - `damping`: lambda. It has to exceed the most negative curvature of the risk; 100 by default.
    - `scale`: s, above half of the largest eigenvalue of H; 1000 by default, as in public code.
      About scale / damping steps are needed.
    - `steps`, `repeats`: how many steps a run takes, and of how many runs the mean is taken.
      Public code has 1000 and 10.
    - `length`: how much of the step is taken, 1 by default: theta - length H^-1 g.
    - `seed`: of the batches that are drawn.
    - `include`, `exclude`: patterns of the names of parameters, with commas between them.

    The run says how far the solve is off, |g - H h / s| / |g| of all retain batches, and the
    cosines of -H^-1 g and of -g with the forget gradient. Nothing is certified: no noise is added.
    Of adapters it is the step of their factors. Needs memory for the graph of a gradient, and for
    some eight float64 copies of the parameters that are chosen.

    Raises ValueError where the solve diverges, for parameters in half precision, and where second
    derivatives are missing or wrong: those along the gradient and along the step are held against
    differences of gradients. Attention that has them is "eager" or "sdpa".

    >>> Newton(damping=1.0, scale=50.0, include="*.mlp.*").sets
    ('forget', 'retain')
    """

    damping: float = 100.0
    scale: float = 1000.0
    steps: int = 100
    repeats: int = 1
    length: float = 1.0
    seed: int = 0
    include: str = "*"
    exclude: str = ""

    def __post_init__(self) -> None:
        finite = is_number(self.damping) and 0 <= self.damping < inf
        check_option(self, "damping", finite, "0 or a positive number")
        check_option(self, "scale", is_number(self.scale) and 0 < self.scale < inf, "positive")
        finite = is_number(self.length) and self.length > 0
        check_option(self, "length", finite, "a positive number")
        for name in ("steps", "repeats"):
            check_option(self, name, is_whole(getattr(self, name), 1), "a whole number from 1 on")
        check_option(self, "seed", is_whole(self.seed), "a whole number")

    @property
    def sets(self) -> tuple[str, ...]:
        return (FORGET, RETAIN)

    @property
    def source(self) -> str:
        return "arXiv 2408.00920"

    def outcome(self, model: nn.Module, data: Data) -> Outcome:
        return self._taken(model, *self._step(model, data))

    def varied(self, option: str, model: nn.Module, data: Data) -> Callable[[float], Outcome]:
        if option != "length":
            return super().varied(option, model, data)
        step, facts = self._step(model, data)
        return lambda value: self.with_option(option, value)._taken(model, step, facts)

    def _taken(self, model: nn.Module, step: Vector, facts: Mapping[str, Any]) -> Outcome:
        parameters = trainable(model)
        moved = {n: parameters[n].detach().double() - self.length * x for n, x in step.items()}
        return Outcome(moved, facts)

    def _step(self, model: nn.Module, data: Data) -> tuple[Vector, dict[str, Any]]:
        """H^-1 g, and what is said of it."""
        parameters = trainable(model)
        names = chosen(self, parameters)
        batches = [*as_batches(data[RETAIN])]
        gradient = gradient_of(model, batches, names)
        length = norm(gradient)
        if not 0 < length < inf:
            raise ValueError(
                "The retain gradient of Newton should be finite, and not zero. Found a length of "
                f"{length}. See whether the model is finite, and reaches what is edited."
            )
        hessian = Hessian(model, batches, {n: parameters[n] for n in names}, self.damping)
        draw = random.Random(self.seed)
        with undisturbed(model, recompute=False), sdpa_kernel(SDPBackend.MATH):
            hessian.check(gradient, hessian.longest)
            runs = [self._solved(hessian, gradient, draw) for _ in range(self.repeats)]
            step = {n: torch.stack([run[n] for run in runs]).mean(dim=0) for n in names}
            product = hessian.product(step)
            hessian.check(step, hessian.every, product)
        residual = norm({n: gradient[n] - product[n] for n in names}) / length
        self._check_near(residual)
        forget = gradient_of(model, data[FORGET], names)
        facts = {
            "scale": self.scale,
            "residual": residual,
            "cosine_with_forget": {
                "-H^-1 g": _cosine(step, forget),
                "-g": _cosine(gradient, forget),
            },
            "parameters": len(names),
            "retain_batches": len(hessian.tokens),
        }
        return step, facts

    def _solved(self, hessian: Hessian, gradient: Vector, draw: random.Random) -> Vector:
        """H^-1 g of one run."""
        length = norm(gradient)
        h = {name: g.clone() for name, g in gradient.items()}
        for step in range(self.steps):
            (index,) = draw.choices(range(len(hessian.tokens)), weights=hessian.tokens)
            product = hessian.of(index, h)
            curvature = dot(h, product) / dot(h, h)
            for name, own in h.items():
                own += gradient[name] - product[name] / self.scale
            # No step lengthens h by more than |g| while the eigenvalues are between 0 and 2 s.
            if not norm(h) <= (step + 2) * length * (1 + 1e-6):
                raise self._diverged(step + 1, curvature)
        return {name: own / self.scale for name, own in h.items()}

    def _diverged(self, step: int, curvature: float) -> ValueError:
        should = "LiSSA of Newton should find eigenvalues of H from 0 to twice `scale`. Found"
        if not isfinite(curvature):
            return ValueError(
                f"{should} a curvature of {curvature} at step {step}. See whether the model and "
                "its second derivatives are finite, in its precision."
            )
        if curvature < 0:
            return ValueError(
                f"{should} that it diverges at step {step}, along a curvature of {curvature:.4g} "
                f"with damping = {self.damping}. Choose a `damping` that is larger by more than "
                "that, or fewer parameters."
            )
        return ValueError(
            f"{should} that it diverges at step {step}, along a curvature of {curvature:.4g} with "
            f"scale = {self.scale}. Choose a `scale` above the curvature, or a larger `damping` "
            "where that is not far from 0."
        )

    def _check_near(self, residual: float) -> None:
        should = "LiSSA of Newton should solve H x = g. Found |g - H x| ="
        advice = (
            f"Take more than {self.steps} `steps`, a `scale` closer to the largest eigenvalue, "
            "more `repeats` where there are several batches, or a larger `damping`."
        )
        if not residual < 1:
            raise ValueError(f"{should} {residual:.3g} |g|, no less than without a step. {advice}")
        if residual > FAR:
            warnings.warn(f"{should} {residual:.3g} |g|. {advice}", stacklevel=2)


def _cosine(step: Vector, forget: Vector) -> float | str:
    """The cosine of minus a step with the forget gradient."""
    lengths = norm(step) * norm(forget)
    return -dot(step, forget) / lengths if 0 < lengths < inf else "undefined"
