"""Sets of an audit: texts beside the tokens that they became, row by row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from geffect.audit.reading import asking, sets_of
from geffect.audit.sets import AuditSet, AuditSets
from geffect.data.examples import example, spelled
from tests.utils.chat import TURNS, make_tokenizer, written

ROW = {
    "question": "Where does Ada live?",
    "answer": "In Paris.",
    "subject": "Ada",
    "entity": "Paris",
    "answers": ["Paris."],
    "wrong": ["In Rome.", "In Bonn."],
    "paraphrases": ["Where is Ada?"],
}
PLAIN = {"question": "Who?", "answer": "Ada."}


@pytest.mark.parametrize("template", [None, TURNS])
def test_every_text_is_rendered_as_a_row_of_its_own(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    found = sets_of({"forget": [ROW, PLAIN], "retain": [PLAIN]}, tokenizer)["forget"]
    for item, changed in [
        (found.items[0], {}),
        (found.alternatives[0][1], {"answer": "In Bonn."}),
        (found.reworded[0][0], {"answer": "Paris."}),
        (found.paraphrased[0][0], {"question": "Where is Ada?"}),
    ]:
        assert item == example({**ROW, **changed}, tokenizer)
    assert found.subjects == ("Ada", "1")
    assert found.entities == ("Paris", "")
    assert found.wrong == (("In Rome.", "In Bonn."), ())
    assert found.questions == ("Where does Ada live?", "Who?")
    assert "In Paris." in spelled(found.items[0], tokenizer).partition("[[")[2]


def test_rows_in_every_form() -> None:
    tokenizer = make_tokenizer(TURNS)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    rows: list[dict[str, Any]] = [
        {"messages": turns, "paraphrases": ["Who is it?"], "wrong": ["Bea."]},
        {
            "prompt": "Who? ",
            "completion": "Ada.",
            "paraphrases": ["Who is it? "],
            "wrong": ["Bea."],
        },
        {"text": "Ada."},
    ]
    found = sets_of({"forget": rows, "retain": rows}, tokenizer)["forget"]
    assert found.questions == ("Who?", "Who? ", "")
    assert found.answers == ("Ada.", "Ada.", "Ada.")
    assert found.paraphrased[0] == (example(asking(rows[0], "Who is it?"), tokenizer),)
    assert found.alternatives[1] == (example({**rows[1], "completion": "Bea."}, tokenizer),)


def test_a_file_and_its_rows_are_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = written(tmp_path / "forget.jsonl", ROW, PLAIN)
    read = sets_of({"forget": path, "retain": [PLAIN]}, tokenizer)
    assert (
        read["forget"] == sets_of({"forget": [ROW, PLAIN], "retain": [PLAIN]}, tokenizer)["forget"]
    )
    assert read.sources == {"forget": str(path)}
    assert read.kept == ("retain",)


def test_running_text_is_cut_into_windows_that_do_not_overlap(tmp_path: Path) -> None:
    tokenizer, path = make_tokenizer(), tmp_path / "text.txt"
    path.write_text("Where does Ada live? " * 9, encoding="utf-8")
    whole = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    given = {"forget": [PLAIN], "retain": [PLAIN], "text": path}
    items = sets_of(given, tokenizer, positions=16)["text"].items
    assert [token for item in items for token in item["input_ids"]] == whole[
        : sum(len(item["input_ids"]) for item in items)
    ]
    assert all(item["labels"] == [-100, *item["input_ids"][1:]] for item in items)


def test_some_rows_keep_all_that_stands_beside_them() -> None:
    found = sets_of({"forget": [PLAIN, ROW], "retain": [PLAIN]}, make_tokenizer())["forget"]
    turned = found.some([1, 0])
    assert turned.subjects == ("Ada", "0")
    assert turned.some([1, 0]) == found


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"wrong": "In Rome."}, "'In Rome.'"),
        ({"wrong": [""]}, r"\[''\]"),
        ({"paraphrases": [3]}, r"\[3\]"),
        ({"subject": 7}, "7"),
        ({"entity": "Rome"}, "'Rome'"),
        ({"answer": " "}, "' '"),
    ],
)
def test_a_row_in_another_form_is_refused_with_its_place(
    changed: dict[str, Any], found: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "forget.jsonl", ROW, {**ROW, **changed})
    with pytest.raises(ValueError, match=rf"line 2,.* should have .*Found .*{found}"):
        sets_of({"forget": path, "retain": [PLAIN]}, make_tokenizer())


def test_names_that_an_audit_does_not_know_and_sets_it_needs() -> None:
    item = {"input_ids": [1], "labels": [1]}
    with pytest.raises(ValueError, match=r"Found `retian`\. Did you mean `retain`"):
        sets_of({"forget": [item], "retian": [item]})
    with pytest.raises(ValueError, match="Found no `retain`"):
        sets_of({"forget": [item]})
    with pytest.raises(ValueError, match="Found none"):
        sets_of({"forget": [], "retain": [item]})
    with pytest.raises(ValueError, match="`tokenizer` should be given"):
        sets_of({"forget": [PLAIN], "retain": [item]})
    with pytest.raises(ValueError, match="Found int"):
        sets_of({"forget": 3, "retain": [item]})
    with pytest.raises(ValueError, match="at most 3 tokens"):
        sets_of({"forget": [PLAIN], "retain": [item]}, make_tokenizer(), positions=3)
    with pytest.raises(ValueError, match="an entry for each of its 1 items"):
        AuditSet.of("forget", [item], subjects=["a", "b"])
    with pytest.raises(ValueError, match=r"Found `answer`\. Did you mean `answers`"):
        AuditSet.of("forget", [item], answer=["a"])


def test_a_set_may_be_used_under_another_name() -> None:
    own = AuditSet.of("a", [{"input_ids": [1], "labels": [1]}])
    sets = sets_of({"forget": own, "retain": own})
    assert sets["retain"].name == "retain"
    assert json.dumps([*sets]) == '["forget", "retain"]'
    assert isinstance(sets, AuditSets)


def test_a_row_without_a_subject_is_about_nothing_that_another_one_names() -> None:
    rows = [{**PLAIN, "subject": "1"}, PLAIN, PLAIN]
    sets = sets_of({"forget": rows, "retain": [PLAIN]}, make_tokenizer())
    assert len({*sets["forget"].subjects}) == 3


@pytest.mark.parametrize(
    ("changed", "taken"),
    [({"wrong": ["In Rome.", "In Paris. "]}, "In Paris. "), ({"wrong": ["Paris."]}, "Paris.")],
)
def test_an_answer_is_not_right_and_wrong(changed: dict[str, Any], taken: str) -> None:
    with pytest.raises(ValueError, match=f"in `wrong` that are not right. Found '{taken}'"):
        sets_of({"forget": [{**ROW, **changed}], "retain": [PLAIN]}, make_tokenizer())


def test_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("Größe".encode("latin-1"))
    given = {"forget": [PLAIN], "retain": [PLAIN], "text": tmp_path / "text.txt"}
    with pytest.raises(ValueError, match="Found a byte that is none at 2"):
        sets_of(given, make_tokenizer())


def test_choices_have_the_answer_among_them() -> None:
    tokenizer = make_tokenizer()
    row = {**PLAIN, "choices": ["Bea.", "Ada.", "Cid."]}
    found = sets_of({"forget": [row, PLAIN], "retain": [PLAIN]}, tokenizer)["forget"]
    assert found.choices == (("Bea.", "Ada.", "Cid."), ()) and found.options[1] == ()
    assert [*found.options[0]] == [
        example({**PLAIN, "answer": choice}, tokenizer) for choice in row["choices"]
    ]
    for choices in (["Ada."], ["Bea.", "Cid."], ["Ada.", "Ada.", "Bea."], ["Bea.", "Bea.", "Ada."]):
        with pytest.raises(ValueError, match="two `choices` or more, each once, with its answer"):
            sets_of({"forget": [{**PLAIN, "choices": choices}], "retain": [PLAIN]}, tokenizer)


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ({"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1]}, "`attention_mask`"),
        ({"input_ids": [[5, 6]], "labels": [[-100, 6]]}, r"\(1, 2\) in `input_ids`"),
        ({"input_ids": 5, "labels": 5}, r"\(\) in `input_ids`"),
    ],
)
def test_an_item_whose_columns_are_of_unequal_lengths_is_named(
    item: dict[str, Any], found: str
) -> None:
    right = {"input_ids": torch.tensor([5, 6]), "labels": [-100, 6], "attention_mask": [1, 1]}
    assert len(AuditSet.of("retain", [right])) == 1
    with pytest.raises(ValueError, match=f"Item 1 of `retain` should be one row.*{found}"):
        AuditSet.of("retain", [right, item])
