"""Newton's step against solves with whole Hessians, and against retraining."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from geffect.edits import Newton
from geffect.layers import trainable
from tests.utils import reference, tiny


class Logistic(nn.Module):
    """Softmax regression on fixed features of the token, in float64: a convex language model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.features = nn.Embedding(tiny.VOCABULARY, 3).requires_grad_(False)
        self.head = nn.Linear(3, tiny.VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.head(self.features(input_ids)))


class Gaussian(nn.Module):
    """Linear regression as a language model: -log p of token 0 is (y - x w)^2 / 2, to a bit."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.y = x, y
        self.w = nn.Parameter(torch.zeros(x.shape[1], dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Any:
        log_q = -0.5 * (self.y - self.x @ self.w)[input_ids].square()
        return SimpleNamespace(logits=torch.stack([log_q, torch.log(-torch.expm1(log_q))], dim=-1))


BATCHES = [tiny.batch(5, rows=4), tiny.batch(6, rows=1), tiny.batch(7, rows=2)]
DATA = {"forget": [tiny.batch(1, rows=2)], "retain": BATCHES}


def risk(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """The mean over all answer tokens of all batches."""
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    terms = [c * reference.nll(model, b) for b, c in zip(batches, counts, strict=True)]
    return torch.stack(terms).sum() / sum(counts)


def whole(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> Any:
    """The gradient and the Hessian of the risk in some parameters, as a vector and a matrix."""
    own = {n: p.detach() for n, p in model.named_parameters() if n in names}
    start = torch.cat([own[n].flatten() for n in names])

    def at(flat: Tensor) -> Tensor:
        parts = flat.split([own[n].numel() for n in names])
        given = {n: part.view_as(own[n]) for n, part in zip(names, parts, strict=True)}
        return risk(lambda **batch: functional_call(model, given, (), batch), batches)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.grad(at)(start), hessian(at)(start)


def flat(found: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([found[n].flatten() for n in names])


def test_a_solve_on_logistic_regression() -> None:
    """Of one batch every step has the whole Hessian."""
    model, names = Logistic(), ["head.weight", "head.bias"]
    g, H = whole(model, names, BATCHES[:1])
    H = H + 0.1 * torch.eye(len(H)).double()
    expected = -torch.linalg.solve(H, g)
    edit = Newton(damping=0.1, scale=torch.linalg.eigvalsh(H)[-1].item(), steps=400)
    change = edit.change(model, {**DATA, "retain": BATCHES[:1]})
    assert torch.allclose(flat(change.displacement, names), expected, rtol=1e-9, atol=1e-11)
    assert change.facts["residual"] < 1e-9 and change.facts["scale"] == edit.scale
    f = flat(reference.gradient(model, risk(model, DATA["forget"])), names)
    for name, vector in (("-H^-1 g", expected), ("-g", -g)):
        cosine = torch.dot(vector, f) / vector.norm() / f.norm()
        assert change.facts["cosine_with_forget"][name] == pytest.approx(cosine.item(), rel=1e-8)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_loop_of_few_steps(steps: int) -> None:
    model, names = Logistic(), ["head.weight", "head.bias"]
    g, H = whole(model, names, BATCHES[:1])
    h = g
    for _ in range(steps):
        h = h + g - (H @ h + 0.5 * h) / 5.0
    with pytest.warns(UserWarning, match="more than"):
        found = Newton(damping=0.5, scale=5.0, steps=steps).displacement(
            model, {**DATA, "retain": BATCHES[:1]}
        )
    assert torch.allclose(flat(found, names), -h / 5.0, rtol=1e-10, atol=1e-14)


def test_batches_that_are_drawn_have_the_mean_over_tokens() -> None:
    """The mean of many runs is near the solve of all batches, and each seed draws its own."""
    model, names = Logistic(), ["head.weight", "head.bias"]
    g, H = whole(model, names, BATCHES)
    H = H + torch.eye(len(H)).double()
    expected = -torch.linalg.solve(H, g)
    edit = Newton(damping=1.0, scale=2.0, steps=12, repeats=20)
    change = edit.change(model, DATA)
    one = flat(change.displacement, names)
    assert (one - expected).norm() < 0.02 * expected.norm()
    off = (g + H @ one).norm() / g.norm()
    assert change.facts["residual"] == pytest.approx(off.item(), rel=1e-6)
    few = [Newton(damping=1.0, scale=2.0, steps=12, seed=seed) for seed in (0, 0, 1)]
    two, three, four = (flat(edit.displacement(model, DATA), names) for edit in few)
    assert torch.equal(two, three) and not torch.equal(two, four)


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama], ids=["gpt2", "llama"])
def test_a_part_of_a_model_whose_risk_is_not_convex(make: Any) -> None:
    """Norms before and after attention: second derivatives go through it."""
    model = make()
    exact = make is tiny.gpt2
    pattern = "*.0.ln_1.weight" if exact else "*.0.input_layernorm.weight"
    names = [n for n in trainable(model) if n.endswith(pattern[1:])]
    g, H = whole(model, names, BATCHES[:1])
    lowest, largest = torch.linalg.eigvalsh(H)[[0, -1]].tolist()
    damping = 0.1 + 2 * abs(lowest)
    H = H + damping * torch.eye(len(H)).to(H)
    edit = Newton(damping=damping, scale=damping + largest, steps=20, include=pattern)
    found = edit.displacement(model, {**DATA, "retain": BATCHES[:1]})
    assert [*found] == names
    expected = -torch.linalg.solve(H, g)
    rtol = 1e-8 if exact else 1e-3
    assert (flat(found, names) - expected).norm() < rtol * expected.norm()


def test_ridge_regression_is_retrained() -> None:
    """The penalty is rows of sqrt(l) e_i whose answer is 0, which are always retained."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, generator=draw, dtype=torch.float64)
    y = torch.randn(9, generator=draw, dtype=torch.float64)
    x = torch.cat([x, 0.3 * torch.eye(3).double()])
    y = torch.cat([y, torch.zeros(3).double()])
    model = Gaussian(x, y)

    def batch(rows: list[int]) -> dict[str, Tensor]:
        ids = torch.tensor([[row, 0] for row in rows])
        return {"input_ids": ids, "labels": torch.tensor([[-100, 0]] * len(rows))}

    with torch.no_grad():
        model.w.copy_(torch.linalg.lstsq(x, y).solution)
    keep = [*range(2, 12)]
    retrained = torch.linalg.lstsq(x[keep], y[keep]).solution
    data = {"forget": batch([0, 1]), "retain": batch(keep)}
    largest = torch.linalg.eigvalsh(x[keep].T @ x[keep] / len(keep))[-1].item()
    with Newton(damping=0.0, scale=largest, steps=600).change(model, data):
        assert torch.allclose(model.w, retrained, rtol=1e-8, atol=1e-9)
    # At a minimum of the whole it is n_u / (n - n_u) H^-1 of the forget gradient.
    H = x[keep].T @ x[keep] / len(keep)
    forget = x[:2].T @ (x[:2] @ model.w.detach() - y[:2]) / 2
    step = 2 / 10 * torch.linalg.solve(H, forget)
    assert torch.allclose(retrained - model.w.detach(), step, rtol=1e-9, atol=1e-12)


def test_divergence_is_refused() -> None:
    model, names = Logistic(), ["head.weight", "head.bias"]
    _, H = whole(model, names, BATCHES[:1])
    top = torch.linalg.eigvalsh(H)[-1].item() + 0.1
    data = {**DATA, "retain": BATCHES[:1]}
    for factor in (0.3, 0.45):
        with pytest.raises(ValueError, match=r"diverges at step .* Choose a `scale` above"):
            Newton(damping=0.1, scale=factor * top, steps=2000).change(model, data)
    assert Newton(damping=0.1, scale=0.55 * top, steps=300).change(model, data).touched
    with pytest.raises(ValueError, match=r"curvature of -.* Choose a `damping` that is larger"):
        Newton(damping=0.0, scale=100.0, steps=200).change(tiny.gpt2(), DATA)


def test_few_steps_that_go_astray_are_refused() -> None:
    model, names = Logistic(), ["head.weight", "head.bias"]
    with pytest.raises(ValueError, match=r"no less than without a step|diverges at step"):
        Newton(damping=0.0, scale=1e-3, steps=1).change(model, DATA)
    assert names


def test_it_leaves_no_trace() -> None:
    model = tiny.gpt2()
    model.train()
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    Newton(scale=300.0, steps=15).displacement(model, DATA)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert (model.transformer.wte.weight.grad == 1).all()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"damping": -1.0}, "damping = -1.0"),
        ({"damping": math.inf}, "damping = inf"),
        ({"scale": 0.0}, "scale = 0.0"),
        ({"scale": math.nan}, "scale = nan"),
        ({"steps": 0}, "steps = 0"),
        ({"repeats": 1.5}, "repeats = 1.5"),
        ({"seed": 0.5}, "seed = 0.5"),
        ({"seed": True}, "seed = True"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        Newton(**options)


def test_models_and_data_that_are_refused() -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"Found `\*mpl\*`, which none of them has"):
        Newton(include="*mpl*").change(model, DATA)
    unscored = {**BATCHES[0], "labels": torch.full((4, 9), -100)}
    with pytest.raises(ValueError, match="should have an answer token"):
        Newton().change(model, {**DATA, "retain": unscored})
    model.lm_head.config = SimpleNamespace(_attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match='Found "flash_attention_2"'):
        Newton().change(model, DATA)
    odd = tiny.llama()
    with torch.no_grad():
        odd.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="should be finite, and not zero"):
        Newton().change(odd, DATA)


def test_a_kernel_without_a_second_derivative_is_refused() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return slope * ctx.saved_tensors[0].cos()

    class Kernel(Logistic):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return SimpleNamespace(logits=Once.apply(super().forward(input_ids).logits))

    with pytest.raises(ValueError, match="should have second derivatives"):
        Newton().change(Kernel(), DATA)


class Drops(torch.autograd.Function):
    """x + c sin x, whose backward pass has a slope that knows of no x: no error is told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.slope = 1 + strength * x.detach().cos()
        return x + strength * x.sin()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope * ctx.slope, None


@pytest.mark.parametrize(("strength", "refused"), [(0.5, True), (0.02, True), (0.0, False)])
def test_second_derivatives_that_are_left_out_in_silence_are_refused(
    strength: float, refused: bool
) -> None:
    class Bent(Logistic):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            logits = super().forward(input_ids).logits
            return SimpleNamespace(logits=Drops.apply(logits, strength))

    model = Bent()
    with torch.no_grad():
        model.head.weight.mul_(20.0)  # where the risk is far from its minimum
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    edit = Newton(damping=2.0, scale=20.0, steps=60)
    with nullcontext() if not refused else pytest.raises(ValueError, match="the slopes of its"):
        assert edit.change(model, DATA).touched
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 or float64. Found torch.bfloat16"):
        Newton().change(tiny.llama().bfloat16(), DATA)


def test_factors_of_an_adapter() -> None:
    """The step is that of the factors, whose Hessian has the product in it."""
    model = tiny.gpt2()
    config = LoraConfig(r=2, target_modules=["c_proj"], layers_to_transform=[0], lora_dropout=0.5)
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    for parameter in trainable(adapted).values():
        nn.init.normal_(parameter, std=0.2)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    adapted.eval()
    g, H = whole(adapted, names, BATCHES[:1])
    lowest, largest = torch.linalg.eigvalsh(H)[[0, -1]].tolist()
    damping = 0.5 + 2 * abs(lowest)
    expected = -torch.linalg.solve(H + damping * torch.eye(len(H)).to(H), g)
    adapted.train()
    edit = Newton(damping=damping, scale=damping + largest, steps=80)
    change = edit.change(adapted, {**DATA, "retain": BATCHES[:1]})
    assert change.space == "adapter"
    found = torch.cat([change.displacement[n].flatten() for n in trainable(adapted)])
    assert (found - expected).norm() < 1e-6 * expected.norm()
