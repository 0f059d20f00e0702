"""Estimates against the measured peak of real steps, real files, and counts by hand."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3MoeConfig,
    T5Config,
)

from geffect import Recorder, Rectifier
from geffect.costs import Estimate, Shape, estimate
from geffect.costs.live_bytes import LiveBytes
from geffect.costs.measured import constants
from geffect.layers import describe
from geffect.objectives import nll
from geffect.projection import SAGO
from geffect.store.segments import folder_of
from tests.bench.constants import constants as shipped
from tests.utils.command_line import Ask

VOCABULARY = 4096

RECTIFIERS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "update": {"space": "update"},
    "coordinate": {"space": "update", "scope": "coordinate"},
    "select": {"select": 0.1},
    "sago": {"rule": SAGO(), "ema": 1.0},
}


def config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=6, use_cache=False, **more,
    )  # fmt: skip


def measured(found: Estimate, path: Path) -> int:
    """The peak of the second step of such a setting, of all tensors that are alive."""
    of = found.setting
    with LiveBytes() as live:
        model: Any = LlamaForCausalLM(config()).to(getattr(torch, of["dtype"])).train()
        if of["checkpointing"]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def risk() -> Tensor:
            ids = torch.randint(0, VOCABULARY, (of["samples"], of["positions"]))
            return nll(model, {"input_ids": ids, "labels": ids})

        losses: dict[str, Any] = {"objective": {"forget": -1.0}}
        losses |= {"forget": lambda: risk(), "retain": lambda: risk()}  # one function is one pass
        if of["gradients"] == 3:
            losses["objective"] = lambda: -risk()
        backward = plain_of(losses)
        recorder = None
        if of["rectifier"] is not None:
            rectifier = Rectifier(model, optimizer=optimizer, **RECTIFIERS[of["rectifier"]])
            backward = lambda: rectifier.backward(**losses)  # noqa: E731
        if of["store"] is not None:
            recorder = Recorder(model, path)
            also = {} if of["rectifier"] is None else {"rectifier": rectifier}
            backward = lambda: recorder.backward(**losses, **also)  # noqa: E731
        for _ in range(2):
            live.peak = live.now
            backward()
            optimizer.step()
            optimizer.zero_grad()
        if recorder is not None:
            recorder.close()
        return live.peak


def plain_of(losses: dict[str, Any]) -> Callable[[], None]:
    def passes() -> None:
        for loss in losses.values():
            if callable(loss):
                loss().backward()

    return passes


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"store": None}, Shape(1, 16)),
        ({}, Shape(1, 16)),
        ({}, Shape(4, 64)),
        ({"gradients": 3}, Shape(4, 64)),
        ({}, Shape(4, 64, checkpointing=True)),
        ({"rectifier": "gradient", "store": None}, Shape(1, 16)),
        ({"rectifier": "gradient"}, Shape(1, 16)),
        ({"rectifier": "gradient", "store": None}, Shape(4, 64)),
        ({"rectifier": "update"}, Shape(1, 16)),
        ({"rectifier": "coordinate"}, Shape(1, 16)),
        ({"rectifier": "select"}, Shape(1, 16)),
        ({"rectifier": "sago", "store": None}, Shape(1, 16)),
    ],
    ids=str,
)
def test_memory_is_that_of_a_real_step(options: Any, batch: Shape, tmp_path: Path) -> None:
    found = estimate(config(), dtype="float32", batch=batch, **options)
    real = measured(found, tmp_path / "a.h5")
    assert found.peak == pytest.approx(real, rel=0.1)
    if options == {"store": None}:
        assert found.plain == found.peak
    assert found.plain <= found.peak


@pytest.mark.parametrize("options", [{}, {"rectifier": "gradient", "store": None}], ids=str)
def test_memory_in_bfloat16(options: Any, tmp_path: Path) -> None:
    found = estimate(config(), batch=Shape(1, 4), **options)
    assert found.peak == pytest.approx(measured(found, tmp_path / "a.h5"), rel=0.1)


@pytest.mark.parametrize(
    ("store", "rectifier"),
    [("gram", None), ("sketch", None), ("int4", None), ("bf16", None), ("gram", "gradient")],
)
def test_the_disk_takes_what_was_told(store: str, rectifier: str | None, tmp_path: Path) -> None:
    small = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(small)
    told = estimate(small, store=store, rectifier=rectifier, dtype="float32", batch=Shape(1, 8))
    ids = torch.arange(8)[None]
    sizes = []
    for steps in (8, 24):  # one segment, and two, both full
        path = tmp_path / f"{steps}.h5"
        more = {} if rectifier is None else {"rectifier": Rectifier(model)}
        with Recorder(model, path, store=store, steps=steps) as recorder:
            for _ in range(steps):
                loss = nll(model, {"input_ids": ids, "labels": ids})
                recorder.backward(objective={"forget": -1.0}, forget=loss, retain=2 * loss, **more)
                model.zero_grad()
        folder = folder_of(path)
        segments = [*folder.iterdir()] if folder.exists() else []
        sizes.append(sum(file.stat().st_size for file in [path, *segments]))
    assert told.disk == pytest.approx((sizes[1] - sizes[0]) / 16, rel=0.1)


def test_what_is_sharded_is_divided() -> None:
    one = estimate("1b", batch=Shape(1, 64))
    for sharding, moments in (("fsdp", 2), ("zero3", 6)):
        found = estimate("1b", gpus=4, sharding=sharding, rectifier="update", batch=Shape(1, 64))
        weights = one.memory["weights"]
        assert found.memory["weights"] == pytest.approx(weights / 4, abs=4)
        assert found.memory["optimizer"] == pytest.approx(moments * weights / 4, abs=32)
        assert found.memory["averages of the rectifier"] == pytest.approx(2 * weights / 4, abs=32)
        # To every process the weights twice a pass, and of every process its gradient.
        assert found.network["passes"] == pytest.approx(2 * 3 * weights * 3 / 4, rel=1e-6)
        assert 0 < found.network["own"] < 10**5
    copied = estimate("1b", gpus=4, sharding="ddp", batch=Shape(1, 64))
    assert copied.memory["weights"] == one.memory["weights"]
    assert copied.network["passes"] == pytest.approx(2 * 2 * one.memory["weights"] * 3 / 4)
    assert one.network == {"passes": 0, "own": 0}


def test_a_mixture_of_layers_is_traced(tmp_path: Path) -> None:
    other = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    other.save_pretrained(tmp_path)
    found = estimate(tmp_path, batch=Shape(2, 8))
    with torch.device("meta"):
        from transformers import Qwen2ForCausalLM

        model = Qwen2ForCausalLM(other)
    assert found.setting["parameters"] == sum(row.numel for row in describe(model))
    assert found.memory["weights"] == 2 * found.setting["parameters"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "9b"}, r"one of 1b, 7b, 70b, 405b.* Found `9b`"),
        ({"sharding": "fsdp"}, r'"none" on one process.* Found `gpus = 1` and `sharding = "fsdp"`'),
        ({"gpus": 8}, r"say how the model is on several"),
        ({"gpus": 0}, r"at least 1. Found `0`"),
        ({"gpus": True}, r"at least 1. Found `True`"),
        ({"gpus": 2, "sharding": "tp"}, r"`sharding` should be one of .* Found `tp`"),
        ({"rectifier": "pcgrad"}, r"`rectifier` should be one of None, gradient"),
        ({"dtype": "float16"}, r"`dtype` should be one of float32, bfloat16"),
        ({"gradients": 4}, r"one of 2, 3. Found `4`"),
        ({"store": "int5"}, r"`store` should be one of"),
        ({"gpus": 2, "sharding": "fsdp", "store": "int4"}, r"for a sharded model.* Found `int4`"),
        ({"model": T5Config()}, r"a causal language model.* Found `T5Config`"),
        ({"model": LlamaConfig(max_position_embeddings=64)}, r"at most 64 positions.* Found 2048"),
        ({"model": BertConfig(num_hidden_layers=2), "batch": Shape(1, 8)}, r"looks ahead"),
        (
            {
                "model": Qwen3MoeConfig(
                    num_hidden_layers=3,
                    mlp_only_layers=[0],
                    hidden_size=32,
                    moe_intermediate_size=8,
                    num_experts=8,
                    vocab_size=64,
                ),
                "batch": Shape(1, 8),
            },
            r"layers of the model should be as the second|should be one that can be traced",
        ),
        ({"model": LlamaConfig(num_hidden_layers=1)}, r"at least 2. Found 1"),
    ],
)
def test_what_cannot_be_told_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        estimate(**{"model": "1b", **options})


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{}", "Unrecognized model"),
        ("{", "not a valid JSON file"),
        ('{"model_type": "nope"}', "model type `nope`"),
        ('{"model_type": "llama", "num_attention_heads": 7}', "not a multiple of the number of"),
        ('{"model_type": "llama", "num_hidden_layers": "x"}', "expected int, got str"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_sentence(
    written: str, said: str, tmp_path: Path, ask: Ask
) -> None:
    (tmp_path / "config.json").write_text(written)
    code, _, error = ask("estimate", "--model", tmp_path)
    found = f"should hold a configuration that transformers reads. Found: .*{re.escape(said)}"
    assert code == 2
    assert re.fullmatch(f"geffect: `.*` {found}.*", error.strip())


def test_a_batch_without_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two positions. Found 1 x 1"):
        Shape(1, 1)


def test_constants_are_those_of_the_benchmark() -> None:
    """The traffic is counted by a test of its own; rows of a device replace its earlier ones."""
    there = constants()
    assert there["rows"]
    assert all(row["command"] and row["machine"] and row["torch"] for row in there["rows"])
    row = {"quantity": "recorder, two gradients / plain step", "ratio": 1.5, "spread": 0.1,
           "rounds": 3, "device": "a", "workload": "w", "quick": False, "machine": "m",
           "torch": "2.11", "command": "python -m tests.bench"}  # fmt: skip
    made = shipped([row, {**row, "quantity": "another"}], there)
    assert made["numbers_read_and_written"] == there["numbers_read_and_written"]
    assert made["devices"] == there["devices"]
    assert all(row["command"] for row in made["rows"] if row["device"] == "a")
    assert [r["quantity"] for r in made["rows"] if r["device"] == "a"] == [
        "recorder, two gradients"
    ]
    again = shipped([{**row, "ratio": 2.0}], made)
    assert [r["ratio"] for r in again["rows"] if r["device"] == "a"] == [2.0]


def test_the_command_says_it(ask: Ask) -> None:
    said = ask("estimate", "--model", "1b", "--positions", "64", "--rectifier", "update")
    assert (said.code, said.err) == (0, "")
    for words in (
        "1.24 G parameters of bfloat16",
        "averages of the rectifier",
        "Disk: ",
        "at least",
    ):
        assert words in said.out
    found = ask("estimate", "--model", "1b", "--positions", "64", "--gpus", "2", "--format", "json")
    assert '"sharding": "fsdp"' in found.out
    refused = ask("estimate", "--model", "1b", "--sharding", "ddp")
    assert refused.code == 2


PLANNING = Path(__file__).parents[2] / "docs" / "planning.md"
ALL = re.MULTILINE | re.DOTALL
BLOCKS = re.findall(r"^```console\n(.*?)^```", PLANNING.read_text(encoding="utf-8"), ALL)
SHOWN = dict(re.findall(r"^\$ geffect (.*?)\n(.*?)(?=^\$|\Z)", "".join(BLOCKS), ALL))
"""What each command on the page is shown to answer."""


@pytest.mark.parametrize("told", SHOWN)
def test_the_page_shows_what_the_command_says(told: str, ask: Ask) -> None:
    said = ask(*shlex.split(told))
    assert (said.code, said.err) == (0, "")
    assert said.out.split() == SHOWN[told].split()


def test_the_page_shows_three_sizes() -> None:
    assert len(SHOWN) == 3
