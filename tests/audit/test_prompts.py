"""Prompts: what stands in each, what of it is scored, and what must not change it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from geffect.audit.prompts import LEAKY, ROUGE, SHOTS, over_prompts, prompted, prompts
from geffect.audit.reading import sets_of
from geffect.audit.sets import AuditSet
from geffect.data.examples import spelled
from geffect.evaluation.answers import sampled
from geffect.risk import log_likelihood
from tests.utils.chat import TURNS, make_tokenizer

FORGET = [
    {
        "question": "Where does Ada live?",
        "answer": "In Paris.",
        "subject": "Ada",
        "paraphrases": ["In which town is Ada?"],
    },
    {"question": "Who is Ada?", "answer": "A poet.", "subject": "Ada"},
    {"question": "Where does Bob live?", "answer": "In Rome with Ada.", "subject": "Bob"},
]
RETAIN = [
    {"question": f"Where does {name} live?", "answer": f"In {town}.", "subject": name}
    for name, town in [("Ada", "Lund"), ("Cid", "Oslo"), ("Dan", "Bern"), ("Eve", "Bonn")]
]


def sets(template: str | None = TURNS, **rows: Any) -> tuple[AuditSet, AuditSet, Any]:
    tokenizer = make_tokenizer(template)
    found = sets_of({"forget": FORGET, "retain": RETAIN, **rows}, tokenizer)
    return found["forget"], found["retain"], tokenizer


def model(positions: int = 512) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=positions, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def texts(template: str | None = TURNS, **options: Any) -> dict[tuple[int, str], str]:
    """Every prompt as text, with what is scored in brackets."""
    asked, retain, tokenizer = sets(template)
    rows = prompted(options.pop("of", model()), asked, retain, tokenizer, **options)
    return {(row.index, row.prompt): spelled(row.item, tokenizer) for row in rows}


def test_prompts_of_a_chat() -> None:
    found = texts(shots=1)
    begin = "<|user|>Where does Ada live?<end>\n<|assistant|>"
    assert found[0, "as it is"] == f"{begin}[[In Paris.<end>]]"
    assert found[0, "paraphrase 1"].startswith("<|user|>In which town is Ada?<end>")
    assert (1, "paraphrase 1") not in found
    assert found[0, "sure"] == f"{begin}Sure, here is the answer:[[ In Paris.]]<end>"
    assert found[0, "without template"].startswith("Question: Where does Ada live?\nAnswer:[[ In")
    assert (
        found[0, "lower case"]
        == f"{begin.replace('Ada', 'ada').replace('W', 'w')}[[In Paris.<end>]]"
    )
    for name, shots in ((SHOTS, RETAIN[1:]), (LEAKY, FORGET[1:])):
        assert found[0, name] in [
            f"<|user|>{shot['question']}<end>\n<|assistant|>{shot['answer']}<end>\n"
            f"{found[0, 'as it is']}"
            for shot in shots
        ]
    answer = "In Rome with Ada."
    for name in ("first 25 %", "first 50 %"):
        before, scored = found[2, name].removesuffix("]]<end>").split("[[")
        assert before.endswith(answer.removesuffix(scored)) and answer.endswith(scored)
        assert scored != answer


def test_prompts_without_a_chat_template() -> None:
    found = texts(None, shots=2)
    assert (0, "without template") not in found
    assert found[0, SHOTS].endswith(
        "\n\nQuestion: Where does Ada live?\nAnswer:[[ In Paris.<eos>]]"
    )
    assert found[0, SHOTS].count("Question: ") == 3
    asked, retain, tokenizer = sets(
        None, forget=[{"prompt": "Ada lives in", "completion": " Paris.", "subject": "Ada"}]
    )
    rows = {
        r.prompt: spelled(r.item, tokenizer) for r in prompted(model(), asked, retain, tokenizer)
    }
    assert rows["lower case"] == "ada lives in[[ Paris.<eos>]]"
    assert rows["sure"].startswith("Ada lives in Sure, here is the answer:[[")
    assert rows[SHOTS].endswith("\n\nAda lives in[[ Paris.<eos>]]")


@pytest.mark.parametrize("template", [TURNS, None])
def test_a_share_of_the_answer_is_given_without_its_end(template: str | None) -> None:
    asked, retain, tokenizer = sets(template)
    rows = {(r.index, r.prompt): r.item for r in prompted(model(), asked, retain, tokenizer)}
    for index, item in enumerate(asked.items):
        count = sum(label != -100 for label in item["labels"]) - 1
        for name, share in (("first 25 %", 0.25), ("first 50 %", 0.5)):
            if not int(share * count):
                assert (index, name) not in rows
                continue
            labels = rows[index, name]["labels"]
            assert sum(label != -100 for label in labels) == count - int(share * count)
            assert labels[-1] == -100
    one = AuditSet.of("forget", [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}])
    found = [row.prompt for row in prompted(model(), one, retain, tokenizer)]
    assert found == ["as it is"]  # of one token nothing can be given; no text, no other prompt


def test_no_shot_is_of_the_subject_and_all_fit() -> None:
    many = texts(shots=9)
    assert all("Lund" not in many[index, SHOTS] for index in (0, 1))
    assert "Lund" in many[2, SHOTS] and many[2, SHOTS].count("<|user|>") == 5
    assert all(answer["answer"] not in many[0, SHOTS] for answer in FORGET[1:])
    assert many[0, LEAKY].count("<|user|>") == 3
    few = texts(shots=9, of=model(positions=60))
    assert 1 < few[2, SHOTS].count("<|user|>") < 5
    assert (0, SHOTS) not in texts(of=model(positions=24))


def test_values_are_those_of_each_row_by_itself() -> None:
    asked, retain, tokenizer = sets()
    net = model().eval()
    table = prompts(net, asked, retain, tokenizer, samples=0)
    rows = list(prompted(net, asked, retain, tokenizer))
    assert len(table) == len(rows) and set(table["metric"]) == {"prob"}
    ended = tokenizer.convert_tokens_to_ids(["<end>", "<eos>"])
    for row, value in zip(rows, table["value"], strict=True):
        ids, labels = (torch.tensor([row.item[name]]) for name in ("input_ids", "labels"))
        labels = labels.masked_fill(torch.isin(labels, torch.tensor(ended)), -100)[:, 1:]
        with torch.no_grad():
            log_p = log_likelihood(net(input_ids=ids).logits[:, :-1], labels)
        expected = float((log_p.sum() / (labels != -100).sum()).exp())
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    other = prompts(net, asked, retain, tokenizer, samples=0, metric="nll")
    np.testing.assert_allclose(other["value"], -np.log(table["value"]), atol=1e-9)


def test_the_order_of_items_changes_nothing() -> None:
    asked, retain, tokenizer = sets()
    net = model()
    state = torch.get_rng_state()
    table = prompts(net, asked, retain, tokenizer, samples=2)
    back = prompts(
        net, asked.some([2, 1, 0]), retain.some([3, 1, 0, 2]), tokenizer, samples=2
    ).assign(item=lambda t: 2 - t["item"])
    keys = ["prompt", "item", "metric"]
    pd.testing.assert_frame_equal(
        table.sort_values(keys, ignore_index=True),
        back.sort_values(keys, ignore_index=True),
        rtol=1e-5,
    )
    assert torch.equal(state, torch.get_rng_state()) and net.training


class Parrot(nn.Module):
    """One of two texts, as likely as each other, after any question."""

    def __init__(self, tokenizer: Any, *said: str) -> None:
        super().__init__()
        self.said = [[*tokenizer(text)["input_ids"], 2] for text in said]
        self.begin = tokenizer.convert_tokens_to_ids("<|assistant|>")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        logits = torch.full((*input_ids.shape, 300), -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids)):
                so_far = ids[: place + 1]
                begun = so_far[so_far.index(self.begin) + 1 :] if self.begin in so_far else []
                fit = [s for s in self.said if s[: len(begun)] == begun and len(s) > len(begun)]
                for text in fit or [[2] * 99]:
                    logits[row, place, text[len(begun)]] = 0.0
        return SimpleNamespace(logits=logits)


def test_the_best_of_some_samples_counts() -> None:
    asked, retain, tokenizer = sets()
    parrot = Parrot(tokenizer, "In Paris.", "No.")

    def best(count: int) -> list[float]:
        table = prompts(parrot, asked, retain, tokenizer, samples=count, shots=0)
        found = table[table["prompt"] == "samples"]
        assert (found["metric"] == ROUGE).all() and found["item"].tolist() == [0, 1, 2]
        return found["value"].tolist()

    assert best(8) == [1.0, 0.0, 0.25]  # "In" of "In Rome with Ada."
    said = sampled(parrot, asked.items, end=2, longest=9, count=40)
    drawn = [tokenizer.decode(tokens) for texts in said for tokens in texts]
    assert {*drawn} == {"In Paris.", "No."} and 40 < drawn.count("No.") < 80


def test_over_prompts() -> None:
    table = pd.DataFrame(
        [
            ("as it is", 0, "nll", 2.0),
            ("sure", 0, "nll", 1.0),
            (LEAKY, 0, "nll", 0.5),
            ("as it is", 1, "nll", np.nan),
            ("samples", 0, ROUGE, 0.5),
        ],
        columns=["prompt", "item", "metric", "value"],
    )
    found = over_prompts(table).set_index(["item", "metric"])
    assert found.loc[(0, "nll")].tolist() == ["sure", 1.0, 1.5]
    assert found.loc[(0, ROUGE)].tolist() == ["samples", 0.5, 0.5]
    assert found.loc[(1, "nll"), "prompt"] == "" and np.isnan(found.loc[(1, "nll"), "most"])
    assert over_prompts(table, leaky=True).iloc[0]["most"] == 0.5


def test_unknown_metrics_are_refused() -> None:
    asked, retain, tokenizer = sets()
    with pytest.raises(ValueError, match="`metric` should be one of nll, prob"):
        prompts(model(), asked, retain, tokenizer, metric="loss")
