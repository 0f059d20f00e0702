"""A whole audit on random models: what it refuses, what it tells, and that it changes nothing."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import geffect
from geffect.audit import AuditSet, Thresholds
from geffect.audit.auditing import audit
from geffect.audit.quantisers import Int8
from geffect.audit.rounding import rounded, same_codes
from geffect.audit.verdict import judged
from geffect.data.examples import example
from geffect.evaluation.memorised import nll
from geffect.evaluation.tokens import evaluate_tokens
from tests.utils import tiny
from tests.utils.audits import BUDGET, items
from tests.utils.chat import TURNS, make_tokenizer
from tests.utils.models import bits


def chatting(seed: int, vocabulary: int) -> Any:
    """A random Llama with a token for each of a tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=256, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def nll_of(model: Any, item: dict[str, list[int]]) -> float:
    """The NLL of a whole answer, without its last token."""
    ids = torch.tensor([item["input_ids"][:-1]])
    places = [i for i, label in enumerate(item["labels"][:-1]) if label != -100]
    with torch.no_grad():
        log_p = model.eval()(input_ids=ids).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[i - 1, item["labels"][i]]) for i in places)


UNANSWERED = [{"input_ids": [3, 4], "labels": [-100, -100]}] * 2

TOLD_BY = ("memorised", "utility")
TOLD = ["nll", "prob", "em", "es", "entropy"]


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return [tiny.llama(seed).train() for seed in range(3)]


@pytest.fixture(scope="module")
def found(models: list[nn.Module]) -> Any:
    sets = {"forget": items(0), "retain": items(1), "holdout": items(2)}
    return audit(*models, sets=sets, budget=BUDGET)


def test_an_encoder_decoder_has_answers_of_their_own_length() -> None:
    sets = {
        name: [{"input_ids": [5, 6, 7, 8, 3 + k, 3], "labels": [4 + i, 5, 6]} for i in range(6)]
        for k, name in enumerate(("forget", "retain", "holdout"))
    }
    report = audit(*(tiny.t5(seed).float() for seed in range(3)), sets=sets, budget=BUDGET)
    values = report.table.set_index(["battery", "metric", "set", "model"])["value"]
    original = tiny.t5(1).float()
    batch = {k: torch.tensor([row[k] for row in sets["forget"]]) for k in ("input_ids", "labels")}
    with torch.no_grad():
        loss = float(original(**batch).loss)
    assert values["memorised", "nll", "forget", "original"] == pytest.approx(loss, rel=1e-5)
    assert {"rounding to int8", "rounding to int4"} <= {*report.table["metric"]}


def test_a_causal_model_has_a_label_for_each_token(models: list[nn.Module]) -> None:
    odd = [*items(1), {"input_ids": [3, 4, 5], "labels": [-100, 4]}]
    with pytest.raises(ValueError, match=r"Item 6 of `retain` .* Found 2 of 3"):
        audit(*models, sets={"forget": items(0), "retain": odd}, budget=BUDGET)


def test_no_model_is_changed_in_any_bit(models: list[nn.Module]) -> None:
    before = [bits(model) for model in models]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    audit(*models, sets={"forget": items(0), "retain": items(1)}, budget=BUDGET)
    assert [bits(model) for model in models] == before
    assert all(model.training for model in models)
    assert all(p.grad is None and p.requires_grad for m in models for p in m.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_report_tells_its_verdict_from_its_own_table(found: Any) -> None:
    assert judged(found.table) == found.judgement
    assert {*found.table["battery"]} >= {
        "memorised", "utility", "privacy", "hidden", "direct share", "untold share",
    }  # fmt: skip
    assert found.manifest["roles"] == dict.fromkeys(
        ("original", "retrained", "unlearned"), "LlamaForCausalLM"
    )
    assert found.manifest["thresholds"]["hidden"] == Thresholds().hidden
    told = json.loads(found.to_json())
    assert told["verdict"] == found.verdict and told["exit_code"] == found.judgement.exit_code
    assert len(told["table"]) == len(found.table)


def test_means_are_those_of_the_items(found: Any) -> None:
    keys = ["battery", "metric", "set", "model"]
    means = found.items.groupby(keys)["value"].mean()
    table = found.table.set_index(keys)["value"].reindex(means.index)
    np.testing.assert_allclose(table, means, rtol=1e-12)


def test_the_shares_are_those_of_a_loop(found: Any) -> None:
    means = found.table.set_index(["battery", "metric", "set", "model"])["value"]
    attack = "rounding to int8"
    u, g = (means["hidden", attack, "forget", m] for m in ("unlearned", "retrained"))
    o = means["memorised", "nll", "forget", "original"]
    told = "recoverable share" if abs(g - o) >= 0.1 else "untold share"
    share = means[told, attack, "forget", "unlearned"]
    assert np.isnan(share) if o >= g else share == pytest.approx((g - u) / (g - o))
    kept = means["utility", "kept share", "retain", "unlearned"]
    es = [means["utility", "es", "retain", m] for m in ("unlearned", "original")]
    assert np.isnan(kept) if es[1] == 0 else kept == pytest.approx(es[0] / es[1])


def test_beside_what_rounding_brings_back_stands_what_it_damages(
    models: list[nn.Module], found: Any
) -> None:
    means = found.table.set_index(["battery", "metric", "set", "model"])["value"]
    kept = BUDGET.some_of(AuditSet.of("retain", items(1)), 32)
    with rounded(models[0], Int8()) as model:
        expected = np.mean(nll(evaluate_tokens(model, kept.items)))
    assert means["hidden", "rounding to int8", "retain", "unlearned"] == pytest.approx(expected)
    same = same_codes(models[1], models[0], Int8())
    assert means["codes", "same int8", "forget", "unlearned"] == pytest.approx(same)
    attacked = found.table[found.table["battery"].isin(["recoverable share", "untold share"])]
    assert {*attacked["set"]} == {"forget"} and not attacked["metric"].str.startswith("same").any()


def test_the_order_of_items_changes_nothing(models: list[nn.Module], found: Any) -> None:
    order = [3, 1, 5, 0, 4, 2]
    turned = [items(0)[i] for i in order]
    sets = {"forget": turned, "retain": items(1), "holdout": items(2)}
    again = audit(*models, sets=sets, budget=BUDGET)
    pd.testing.assert_frame_equal(again.table, found.table)
    assert again.judgement == found.judgement
    moved = again.items[again.items["set"] == "forget"].assign(
        item=lambda t: t["item"].map(dict(enumerate(order)))
    )
    kept = found.items[found.items["set"] == "forget"]
    pd.testing.assert_frame_equal(moved.drop(columns="subject"), kept.drop(columns="subject"))


def test_several_retrained_models_are_held_against_by_their_mean(models: list[nn.Module]) -> None:
    others = [models[2], tiny.llama(5).train()]
    sets = {"forget": items(0), "retain": items(1), "holdout": items(2)}
    report = audit(*models[:2], others, sets=sets, budget=BUDGET)
    assert [*report.manifest["models"]] == ["original", "retrained 1", "retrained 2", "unlearned"]
    means = report.table.set_index(["battery", "metric", "set", "model"])["value"]
    for of in (("memorised", "nll", "forget"), ("hidden", "rounding to int8", "forget")):
        own = [means[*of, f"retrained {i}"] for i in (1, 2)]
        assert means[*of, "retrained"] == pytest.approx(sum(own) / 2)
    u, o = (means["memorised", "prob", "forget", m] for m in ("unlearned", "original"))
    known = means["known", "prob", "forget", "original"]
    assert known == pytest.approx(o - means["memorised", "prob", "forget", "retrained"])
    share = means["direct share", "prob of all", "forget", "unlearned"]
    g = means["memorised", "prob", "forget", "retrained"]
    assert share == pytest.approx((u - g) / (1 - g))
    aucs = [means["privacy", "AUC loss", "forget", f"retrained {i}"] for i in (1, 2)]
    assert means["privacy", "AUC loss", "forget", "retrained"] == pytest.approx(sum(aucs) / 2)
    alone = audit(*models[:2], [models[2]], sets=sets, budget=BUDGET, batteries=["memorised"])
    assert [*alone.manifest["models"]] == ["original", "retrained", "unlearned"]


def test_one_model_in_all_places_tells_nothing_apart(models: list[nn.Module]) -> None:
    sets = {"forget": items(0), "retain": items(1)}
    report = audit(*[models[0]] * 3, sets=sets, budget=BUDGET)
    assert report.verdict == "undecided"
    assert "Nothing can be told apart" in report.reasons[0]


def test_a_holdout_stands_for_a_model_that_never_knew(models: list[nn.Module]) -> None:
    sets = {"forget": items(0), "retain": items(1), "holdout": items(2)}
    report = audit(*models[:2], sets=sets, budget=BUDGET, batteries=["memorised", "hidden"])
    rows = report.items
    floor = rows[(rows["set"] == "holdout") & (rows["battery"] == "hidden")]
    assert {*floor["model"]} == {"original"} and len(floor)
    assert any(flag.startswith("floor estimated") for flag in report.flags)


def test_a_battery_alone_measures_nothing_else(models: list[nn.Module]) -> None:
    sets = {"forget": items(0), "retain": items(1)}
    report = audit(*models, sets=sets, batteries=["memorised"], budget=BUDGET)
    assert {*report.items["battery"]} == {"memorised", "utility"}
    assert {*report.items[report.items["battery"] == "utility"]["metric"]} == {"uniform nll"}
    assert report.verdict in ("undecided", "remembers")
    assert not any("relearning" in metric for metric in report.table["metric"])


def test_folders_are_read_and_the_room_is_the_function(tmp_path: Path) -> None:
    for seed, name in enumerate(("unlearned", "original")):
        tiny.llama(seed).save_pretrained(tmp_path / name)
    sets = {"forget": items(0), "retain": items(1), "holdout": items(2)}
    asked = geffect.audit(  # type: ignore[operator, unused-ignore]
        tmp_path / "unlearned",
        original=tmp_path / "original",
        sets={name: geffect.audit.AuditSet.of(name, own) for name, own in sets.items()},  # type: ignore[attr-defined, unused-ignore]
        batteries=["memorised"],
    )
    assert asked.manifest["models"]["original"]["kind"] == "folder"


def test_a_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """To it the tokens of the original are other words, so that it would seem to know nothing."""
    one, other, more = make_tokenizer(), make_tokenizer(), make_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    more.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    for name, tokenizer in (("original", one), ("other", other), ("more", more), ("none", None)):
        chatting(0, len(more)).save_pretrained(tmp_path / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / name)
    sets = {n: [{"question": f"Who is {n}?", "answer": "Ada"}] for n in ("forget", "retain")}

    def asked(unlearned: str, retrained: str) -> str:
        folders = (tmp_path / name for name in (unlearned, "original", retrained))
        return audit(*folders, sets=sets, batteries=["memorised"]).verdict

    for unlearned, retrained, role in (
        ("other", "original", "unlearned"),
        ("original", "other", "retrained"),
    ):
        says = f"The models .* one tokenizer.* in `{tmp_path / 'other'}` .* Pass a {role} model"
        with pytest.raises(ValueError, match=says):
            asked(unlearned, retrained)
    assert asked("more", "none") == "undecided"  # the texts are the same tokens to these


def test_what_cannot_be_measured_is_told(found: Any) -> None:
    skipped = found.manifest["skipped"]
    assert "no wrong answers" in skipped["recognition of unlearned"]
    assert "tokenizer" in skipped["prompt of retrained"]


def test_progress_rises_to_all(models: list[nn.Module]) -> None:
    told: list[float] = []
    sets = {"forget": items(0), "retain": items(1)}
    audit(*models, sets=sets, budget=BUDGET, report=lambda what, done: told.append(done))
    assert told == sorted(told) and told[0] == 0.0 and told[-1] == 1.0


def changed(**options: Any) -> Callable[[list[nn.Module]], Any]:
    sets = {"forget": items(0), "retain": items(1)}
    given: dict[str, Any] = {"sets": sets, "budget": BUDGET, **options}
    return lambda models: audit(*models, **given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batteries": ["hiden"]}, r"Found `hiden`\. Did you mean `hidden`"),
        ({"batteries": []}, "Found none"),
        ({"budget": "fast"}, "`budget` should be one of quick, full"),
        ({"learning_rate": 0}, "`learning_rate` should be a number above 0"),
        ({"sets": {"forget": items(0)}}, "Found no `retain`"),
        ({"sets": {"forget": items(0), "retain": UNANSWERED}}, "`retain` .* Found none in 2"),
        ({"sets": {"forget": [{"text": "Ada"}], "retain": items(1)}}, "`tokenizer` should be"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    models: list[nn.Module], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        changed(**options)(models)


def test_a_score_that_lacks_the_text_of_an_answer_is_told(models: list[nn.Module]) -> None:
    told = ["Ada", "", "Bo", "", "Cy", "Di"]
    asked = AuditSet.of("forget", items(0), answers=told)
    sets = {"forget": asked, "retain": items(1), "holdout": items(2)}
    found = audit(*models, sets=sets, budget=BUDGET, batteries=["privacy"])
    assert found.manifest["skipped"]["zlib of forget"].startswith("2 of 6 items have no answer")
    assert "AUC loss" in {*found.table["metric"]} and "AUC zlib" not in {*found.table["metric"]}


def test_a_model_without_weights_tells_no_learning_rate(models: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match="`learning_rate` should be given"):
        changed()([models[0], nn.Identity(), models[2]])


@pytest.mark.parametrize("role", ["unlearned", "original", "retrained"])
def test_a_model_that_diverged_is_named(models: list[nn.Module], role: str) -> None:
    given = dict(zip(("unlearned", "original", "retrained"), models, strict=True))
    given[role] = copy.deepcopy(given[role])
    nn.init.constant_(given[role].get_parameter("model.norm.weight"), float("nan"))
    with pytest.raises(ValueError, match=rf"Found some that are NaN(.|\n)* with the {role} model"):
        audit(**given, sets={"forget": items(0), "retain": items(1)}, budget=BUDGET)


def test_without_anything_that_never_knew_there_is_no_audit(models: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match="`retrained` model, or a set called `holdout`"):
        changed()(models[:2])
    with pytest.raises(TypeError, match="Did you mean `budget`"):
        changed(buget="quick")(models)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    ("smaller", "said"),
    [
        (lambda m: m.resize_token_embeddings(9), "should have tokens of the model, 0 to 8. Found"),
        (
            lambda m: setattr(m.config, "max_position_embeddings", 6),
            "should have at most 6 tokens.* Found 8",
        ),
    ],
    ids=["vocabulary", "positions"],
)
def test_items_that_a_model_cannot_read(
    models: list[nn.Module],
    place: int,
    smaller: Callable[[nn.Module], object],
    said: str,
    tmp_path: Path,
) -> None:
    model: Any = tiny.llama()
    smaller(model)
    model.save_pretrained(tmp_path)
    given: list[Any] = [*models]
    sets = {"forget": items(0), "retain": items(1)}
    for of in (tmp_path, model):
        given[place] = of
        with pytest.raises(ValueError, match=said):
            audit(*given, sets=sets, budget=BUDGET)


def test_items_without_an_answer_are_listed_and_count_nowhere(models: list[nn.Module]) -> None:
    empty = {"input_ids": items(2)[0]["input_ids"], "labels": [-100] * 8}
    sets = {"forget": [*items(0), empty], "retain": items(1)}
    asked = ["memorised", "utility"]
    found = audit(*models, sets=sets, budget=BUDGET, batteries=asked)
    told = found.manifest["skipped"]["items of forget without an answer"]
    assert told.startswith("1 of 7 have no token that is scored") and "is item 6, " in told
    some = {**sets, "retain": [*items(1)[:2], {**empty, "input_ids": items(1)[2]["input_ids"]}]}
    kept = audit(*models, sets=some, budget=BUDGET, batteries=["utility"]).table
    assert kept[kept["metric"] == "kept share"]["n"].tolist() == [2, 2]
    without = audit(*models, sets={**sets, "forget": items(0)}, budget=BUDGET, batteries=asked)
    assert not any("without an answer" in what for what in without.manifest["skipped"])
    key = ["battery", "metric", "set", "model"]  # bounds are of other draws
    own, other = (r.table.set_index(key).sort_index() for r in (found, without))
    pd.testing.assert_series_equal(own["value"], other["value"])
    assert (own.loc["memorised", "n"] == 6).all()


def test_every_attack_is_of_the_tokens_that_it_is_held_against() -> None:
    """What ends a turn is known to the tokenizer, or to the configuration of one model alone."""
    tokenizer = make_tokenizer(TURNS)
    models = [chatting(seed, len(tokenizer)) for seed in range(2)]
    models.append(copy.deepcopy(models[0]))
    models[1].config.eos_token_id = models[1].generation_config.eos_token_id = 200
    rows = [
        {"question": f"Who is {name}?", "answer": f"Ada {name}.", "wrong": [f"Bo {name}, Cy."]}
        for name in "abcdefgh"
    ]
    sets = {"forget": rows[:4], "retain": rows[4:]}
    # Steps so short that nothing is learned: an attack reads what a plain question does.
    options: Any = {"budget": BUDGET, "tokenizer": tokenizer, "learning_rate": 1e-12}
    unlearned, original = models[2], models[0]
    found = audit(unlearned, original, models[1], sets=sets, **options)
    values = {
        (metric, model): part["value"].to_numpy()
        for (metric, model), part in found.items[found.items["set"] == "forget"].groupby(
            ["metric", "model"]
        )
    }
    for model in ("retrained", "unlearned"):
        plain = values["nll", model]
        assert values["relearning benign, 2 steps, rate x 1", model] == pytest.approx(plain)
    assert values["decoder swap", "unlearned"] == pytest.approx(values["nll", "original"], rel=1e-5)
    log_p = [  # of whole answers, without what ends the turn
        [
            -nll_of(original, example({**row, "answer": text}, tokenizer))
            for text in (row["answer"], *row["wrong"])
        ]
        for row in rows[:4]
    ]
    order = found.items[
        (found.items["metric"] == "recognition") & (found.items["model"] == "original")
    ].set_index("item")["value"]
    assert [order[i] for i in range(4)] == [float(own > other) for own, other in log_p]


@pytest.mark.parametrize("name", ["retain", "neighbours", "world"])
def test_what_should_be_forgotten_and_stay_as_well(models: list[nn.Module], name: str) -> None:
    """A model that forgot it would be broken, and one that kept it would remember."""
    sets = {"forget": items(0), "retain": items(1), name: [*items(2), items(0)[3]]}
    said = f"`forget` should be none of what should stay. Found item 3 .* as item 6 of `{name}`"
    with pytest.raises(ValueError, match=said):
        audit(*models, sets=sets, budget=BUDGET)


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_holdout_that_was_seen(models: list[nn.Module], name: str) -> None:
    sets = {"forget": items(0), "retain": items(1)}
    sets["holdout"] = [*items(2), sets[name][3]]
    with pytest.raises(ValueError, match=f"Found item 6 of it.* also as item 3 of `{name}`"):
        audit(*models, sets=sets, budget=BUDGET)


def test_running_text_has_a_perplexity_and_choices_an_accuracy(models: list[nn.Module]) -> None:
    text = [{**item, "labels": [-100, *item["input_ids"][1:]]} for item in items(3)]
    text[2] = {name: values[:4] for name, values in text[2].items()}
    asked = items(0)
    others = items(4, 12)
    options = tuple(
        ()
        if n == 1
        else tuple(
            {"input_ids": item["input_ids"][:4] + o["input_ids"][4:], "labels": o["labels"]}
            for o in (item, *others[2 * n : 2 * n + 2])
        )
        for n, item in enumerate(asked)
    )
    told = {"answers": ["a"] * 6, "choices": [("a", "b", "c")] * 6, "options": options}
    forget = AuditSet.of("forget", asked, **told)
    sets = {"forget": forget, "retain": items(1), "text": text}
    report = audit(*models, sets=sets, budget=replace(BUDGET, kept=None), batteries=TOLD_BY)
    table = report.table.set_index(["battery", "metric", "set", "model"])
    model = models[0].eval()
    log_p, tokens, right = 0.0, 0, []
    with torch.no_grad():
        for item in text:
            ids = torch.tensor([item["input_ids"]])
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            log_p += float(logs.gather(1, ids[0, 1:, None]).sum())
            tokens += ids.shape[1] - 1
        for own in filter(None, options):
            sums = []
            for option in own:
                ids = torch.tensor([option["input_ids"]])
                logs = model(input_ids=ids).logits[0, 3:-1].log_softmax(-1)
                sums.append(float(logs.gather(1, ids[0, 4:, None]).sum()))
            right.append(sums[0] == max(sums))
    models[0].train()
    perplexity = table.loc[("utility", "perplexity", "text", "unlearned")]
    assert perplexity["value"] == pytest.approx(np.exp(-log_p / tokens), rel=1e-5)
    assert perplexity["low"] < perplexity["value"] < perplexity["high"]
    accuracy = table.loc[("memorised", "choices accuracy_sum", "forget", "unlearned")]
    assert accuracy["value"] == pytest.approx(np.mean(right)) and accuracy["n"] == 5
