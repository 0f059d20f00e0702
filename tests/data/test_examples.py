"""Questions and answers as items: what is scored, and what is refused."""

import builtins
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from geffect.data.collate import Item, batched
from geffect.data.examples import example, read, spelled
from tests.utils.chat import TURNS, make_tokenizer, without, written

SHARED = Path(__file__).parents[3] / "shared" / "data" / "edu_relat"

# As Llama 2 has it: the answer stands between spaces, and the tokenizer's EOS ends it.
INSTRUCTED = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content.strip() }} <eos>{% endif %}{% endfor %}"
)

ROW = {"question": "Where does Ada live?", "answer": "In Paris."}


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def scored(item: Item, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode([label for label in item["labels"] if label != -100])


# What is scored


@pytest.mark.parametrize(
    ("row", "whole", "answer"),
    [
        (ROW, "Question: Where does Ada live?\nAnswer: In Paris.<eos>", "In Paris.<eos>"),
        ({"prompt": "Ada lives in", "completion": " Paris."}, "Ada lives in Paris.<eos>",
         " Paris.<eos>"),
        ({"text": "Ada lives."}, "Ada lives.<eos>", "Ada lives.<eos>"),
    ],
)  # fmt: skip
def test_without_a_template(
    plain: PreTrainedTokenizerFast, tmp_path: Path, row: object, whole: str, answer: str
) -> None:
    (item,) = read(written(tmp_path / "rows.jsonl", row), plain)
    assert plain.decode(item["input_ids"]) == whole
    assert scored(item, plain).strip() == answer.strip()


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"messages": [{"role": "user", "content": ROW["question"]},
                      {"role": "assistant", "content": ROW["answer"]}]},
        {"messages": [{"role": "user", "content": "Does Ada live?"},
                      {"role": "assistant", "content": "In Paris."},
                      {"role": "user", "content": ROW["question"]},
                      {"role": "assistant", "content": ROW["answer"]}]},
    ],
)  # fmt: skip
@pytest.mark.parametrize(("template", "end"), [(TURNS, "<end>"), (INSTRUCTED, "<eos>")])
def test_with_a_template_the_last_answer_is_scored_and_what_ends_it(
    tmp_path: Path, row: object, template: str, end: str
) -> None:
    tokenizer = make_tokenizer(template)
    (item,) = read(written(tmp_path / "rows.jsonl", row), tokenizer)
    assert scored(item, tokenizer).strip() == f"In Paris.{end}"
    rendered = tokenizer.decode(item["input_ids"])
    assert rendered.endswith(end) and rendered.count("Where does Ada live?") == 1
    assert len(item["labels"]) == len(item["input_ids"])
    pairs = zip(item["labels"], item["input_ids"], strict=True)
    assert all(label in (-100, token) for label, token in pairs)


def test_a_prompt_and_its_completion_take_no_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TURNS)
    row = {"prompt": "Ada lives in", "completion": " Paris."}
    (item,) = read(written(tmp_path / "rows.jsonl", row), tokenizer)
    assert spelled(item, tokenizer) == "Ada lives in[[ Paris.<eos>]]"


def test_a_template_may_be_left_out(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TURNS)
    (item,) = read(written(tmp_path / "rows.jsonl", ROW), tokenizer, template=False)
    assert spelled(item, tokenizer).startswith("Question: Where does Ada live?\nAnswer:[[")
    talk = {"messages": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(ValueError, match=r"without a chat template.*it is not to be used"):
        read(written(tmp_path / "talk.jsonl", talk), tokenizer, template=False)


def test_rows_are_cut_off_and_have_to_fit(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", {"text": "Ada."}, ROW)
    short, whole = read(data, plain)
    length = len(whole["input_ids"])
    cut = read(data, plain, max_length=length - 1, positions=length)
    assert cut == [short, {name: values[:-1] for name, values in whole.items()}]
    with pytest.raises(ValueError, match=r"line 2, should have at most 6 tokens.*--max-length 6"):
        read(data, plain, positions=6)
    with pytest.raises(ValueError, match=r"line 2, should have some of its answer in the first 3"):
        read(data, plain, max_length=3)


def test_what_is_scored_is_spelled_out(plain: PreTrainedTokenizerFast) -> None:
    ids = plain("Where Ada Paris")["input_ids"]
    for labels, says in [([-100] * 3, "Where Ada Paris"), (ids, "[[Where Ada Paris]]"),
                         ([ids[0], -100, ids[2]], "[[Where]] Ada[[ Paris]]")]:  # fmt: skip
        assert len(ids) == 3
        assert spelled({"input_ids": ids, "labels": labels}, plain) == says


def test_an_answer_that_merges_with_what_stands_before_is_still_the_answer(
    plain: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # "Paris" after a space is one token with the space: the prompt alone ends in another token.
    (item,) = read(written(tmp_path / "r", {"prompt": "Ada: ", "completion": "Paris."}), plain)
    assert scored(item, plain).strip() == "Paris.<eos>"
    assert -100 in item["labels"]


def test_a_tokenizer_that_ends_every_text_ends_the_answer_once(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    (item,) = read(written(tmp_path / "rows.jsonl", ROW), tokenizer)
    assert item["input_ids"][0] == 1
    assert item["input_ids"].count(2) == 1 and item["labels"][-1] == 2
    assert scored(item, tokenizer).strip() == "In Paris.<eos>"


def test_what_a_tokenizer_does_not_know_is_part_of_the_answer(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<eos>": 1, "q": 2, "a": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    known = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    (item,) = read(written(tmp_path / "r", {"prompt": "q", "completion": " a new a"}), known)
    assert item["labels"] == [-100, 3, 0, 3, 1]


@pytest.mark.parametrize("end", ["<eos>", "<end>", "<eos>\n"])
@pytest.mark.parametrize(
    ("row", "template"),
    [
        ({"prompt": "Ada lives in", "completion": " Paris."}, None),
        ({"prompt": "Ada lives in", "completion": " Paris."}, TURNS),
        ({"prompt": "<|user|>Where?<end>\n<|assistant|>", "completion": "In Paris."}, TURNS),
        ({"text": "Ada lives."}, None),
        (ROW, None),
    ],
)
def test_a_text_may_bring_the_token_that_ends_it(
    row: dict[str, str], template: str | None, end: str
) -> None:
    tokenizer = make_tokenizer(template)
    *_, answer = row
    ended = example({**row, answer: row[answer] + end}, tokenizer)
    expected = example(row, tokenizer)
    (token,) = tokenizer(end.strip(), add_special_tokens=False)["input_ids"]
    for column in ("input_ids", "labels"):
        assert ended[column] == [*expected[column][:-1], token]
    assert ended["labels"][-1] == token and ended["labels"].count(token) == 1


@pytest.mark.parametrize("completion", [" Paris.<eos> Or not.", " Paris.<end><eos>", "<eos>"])
def test_what_stands_behind_an_end_token_is_not_dropped(
    plain: PreTrainedTokenizerFast, completion: str
) -> None:
    with pytest.raises(ValueError, match=r"The row should have its answer, and nothing else"):
        example({"prompt": "Ada lives in", "completion": completion}, plain)


def test_where_the_end_is_the_pad_token_it_is_scored_and_seen(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(pad_token="<eos>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = written(tmp_path / "rows.jsonl", ROW, {"text": "Ada."})
    (batch,) = batched(read(data, tokenizer), 2, pad_token_id=tokenizer.pad_token_id)
    expected = read(data, make_tokenizer())
    for row, item in enumerate(expected):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["labels"].shape[1] - length
        )
        assert batch["labels"][row, :length].tolist() == item["labels"]
        assert batch["labels"][row, length - 1] == tokenizer.eos_token_id
        assert (batch["labels"][row, length:] == -100).all()


def test_the_last_of_several_chats_is_the_one_of_generation(tmp_path: Path) -> None:
    """The labels are those of a loop that looks for the answer in what is decoded so far."""
    tokenizer = make_tokenizer(TURNS)
    (item,) = read(written(tmp_path / "rows.jsonl", ROW), tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": ROW["question"]}], add_generation_prompt=True, tokenize=False
    )
    first = next(i for i, label in enumerate(item["labels"]) if label != -100)
    assert tokenizer.decode(item["input_ids"][:first]) == prompt


# How it says no


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"question": "a", "answer": "b"}', '{"q": 1, "a": 2}'],
         r"line 2, should have `question` and `answer`, or `prompt`.*Found the keys q, a"),
        (["", '{"question": "a"'], "line 2, should be a JSON object.*Found text that is no JSON"),
        (['["a", "b"]'], r"line 1, .* Found list \['a', 'b'\]"),
        (['{"question": "a", "answer": 3}'], "line 1, should have text in .*Found 'a', 3"),
        (['{"question": "a", "answer": " "}'], "line 1, should have text in"),
        (['{"messages": [{"role": "user", "content": "a"}]}'], "`assistant` last"),
        (['{"messages": []}'], "`assistant` last"),
        (['{"messages": [{"role": "assistant", "content": "a"}]}'], "the tokenizer has none"),
        ([], "at least one row with"),
        ([" "], "at least one row with"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(
    plain: PreTrainedTokenizerFast, tmp_path: Path, lines: list[str], says: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=says) as raised:
        read(path, plain)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "Ada \\ud83d"}', r"whole characters\. Found '\\ud83d'"),
        (b'{"text": "Ada", "of": ["\\UDC00"]}', "no JSON"),
        (b"[" * 100_000, "no JSON: maximum recursion"),
        (b'{"text": "Ada", "n": ' + b"1" * 5000 + b"}", "no JSON: Exceeds the limit"),
        (b"\xef\xbb\xbf{}", "no JSON: Unexpected UTF-8 BOM"),
    ],
)
def test_a_line_that_python_reads_and_nobody_else_is_named(
    plain: PreTrainedTokenizerFast, tmp_path: Path, line: bytes, says: str
) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'{"text": "Ada \\ud83d\\ude42"}\n' + line)
    with pytest.raises(ValueError, match=rf"odd\.jsonl`, line 2, .*{says}.*\. (Mend|Write)"):
        read(path, plain)


def test_a_mark_at_the_beginning_of_a_file_is_no_text(
    plain: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    path.write_text('{"text": "Ada"}\n', encoding="utf-8")
    marked.write_text('{"text": "Ada"}\n', encoding="utf-8-sig")
    assert read(marked, plain) == read(path, plain)


def test_a_file_that_is_not_in_utf_8(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "Ada"}\n{"text": "Zo\u00eb"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl`, line 2, should be text in UTF-8.*0xeb"):
        read(path, plain)


def test_a_template_that_changes_the_answer_is_refused(tmp_path: Path) -> None:
    shouts = make_tokenizer(TURNS.replace("m.content", "m.content | upper"))
    with pytest.raises(ValueError, match=r"line 1, should have its answer.*'In Paris.'.*IN PARIS"):
        read(written(tmp_path / "rows.jsonl", ROW), shouts)


def test_an_answer_that_nothing_ends_is_refused(tmp_path: Path) -> None:
    endless = make_tokenizer(eos_token=None)
    with pytest.raises(ValueError, match="token that ends an answer"):
        read(written(tmp_path / "rows.jsonl", ROW), endless)


def test_nothing_there(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"should exist\. Found nothing"):
        read(tmp_path / "none.jsonl", plain)


# Folders of `datasets`


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROW, ROW]).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_data_set_is_its_rows(
    plain: PreTrainedTokenizerFast, saved: Path, tmp_path: Path
) -> None:
    assert read(saved, plain) == read(written(tmp_path / "rows.jsonl", ROW, ROW), plain)


def test_a_folder_of_splits_or_of_something_else_is_refused(
    plain: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW])})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "splits" / "train"))):
        read(tmp_path / "splits", plain)
    with pytest.raises(ValueError, match="saved with save_to_disk"):
        read(tmp_path, plain)


def test_a_missing_package_is_named(
    plain: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "__import__", without("datasets"))
    with pytest.raises(ImportError, match="pip install datasets"):
        read(tmp_path, plain)


# Real rows


def pairs_of_biographies() -> Iterator[dict[str, str]]:
    for person in json.loads((SHARED / "biographies.json").read_text(encoding="utf-8"))[:50]:
        yield person["qa_main"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not there")
@pytest.mark.parametrize("template", [None, TURNS, INSTRUCTED])
def test_real_answers_are_scored_as_they_are(tmp_path: Path, template: str | None) -> None:
    tokenizer, rows = make_tokenizer(template), [*pairs_of_biographies()]
    items = read(written(tmp_path / "rows.jsonl", *rows), tokenizer)
    for row, item in zip(rows, items, strict=True):
        answer = re.sub("<(end|eos)>$", "", scored(item, tokenizer))
        assert answer.strip() == row["answer"].strip()
    batch = batched(items, len(items))[0]
    assert torch.equal(batch["labels"] != -100, batch["labels"] == batch["input_ids"])


# Further answers of a row


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"prompt": "Where does Ada live?", "completion": " In Paris."},
        {"messages": [{"role": "user", "content": ROW["question"]},
                      {"role": "assistant", "content": ROW["answer"]}]},
    ],
)  # fmt: skip
def test_a_further_answer_stands_where_the_own_one_does(tmp_path: Path, row: Any) -> None:
    tokenizer, space = make_tokenizer(TURNS), " " if "completion" in row else ""
    told = {**row, "alternate": f"{space}Ada lives."}
    (item,) = read(written(tmp_path / "rows.jsonl", told), tokenizer, answers=["alternate"])
    key = next(k for k in ("answer", "completion", "messages") if k in row)
    own: Any = told["alternate"]
    if key == "messages":
        own = [row["messages"][0], {"role": "assistant", "content": own}]
    (alone,) = read(written(tmp_path / "one.jsonl", {**row, key: own}), tokenizer)
    assert item["alternate"] == alone and "Ada lives." in scored(alone, tokenizer)
    (plain_item,) = read(written(tmp_path / "rows.jsonl", told), tokenizer)
    assert plain_item == item["original"]


def test_random_answers_are_of_other_rows(plain: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"question": f"Who is {i}?", "answer": f"It is {i}."} for i in range(4)]
    path, names = written(tmp_path / "rows.jsonl", *rows), ["random1", "random2"]
    items = read(path, plain, answers=names, seed=3)
    assert items == read(path, plain, answers=names, seed=3) != read(path, plain, answers=names)
    for i, item in enumerate(items):
        others = {scored(item[name], plain) for name in names}
        assert len(others) == 2 and scored(item["original"], plain) not in others
        assert others <= {scored(other["original"], plain) for other in items}
        for name in names:
            j = next(
                j
                for j in range(4)
                if scored(items[j]["original"], plain) == scored(item[name], plain)
            )
            joined = written(tmp_path / "one.jsonl", {**rows[i], "answer": rows[j]["answer"]})
            assert [item[name]] == read(joined, plain)


def test_random_answers_that_rows_have_are_read(
    plain: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{**ROW, "random1": "Nobody knows."}, {**ROW, "random1": "Somebody knows."}]
    path = written(tmp_path / "rows.jsonl", *rows)
    items = read(path, plain, answers=["random1", "random2"])
    assert [scored(item["random1"], plain) for item in items] != [
        scored(item["random2"], plain) for item in items
    ]
    (alone,) = read(written(tmp_path / "one.jsonl", {**ROW, "answer": "Nobody knows."}), plain)
    assert items[0]["random1"] == alone and items[0]["random2"] == items[1]["original"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, r"line 1, should have an answer in `alternate`.* Found the keys question, answer\. W"),
        ({"alternate": ["a", "b"]}, r"Found \['a', 'b'\]\. Write the text there, one a row"),
        ({"alternate": "  "}, r"Found '  '"),
        ({"alternate": None}, r"Found None"),
        ({"alternate": "word " * 99}, r"line 1, `alternate` should have at most 40 tokens"),
    ],
)
def test_a_further_answer_that_is_none_is_refused(
    plain: PreTrainedTokenizerFast, tmp_path: Path, given: dict[str, Any], says: str
) -> None:
    path = written(tmp_path / "rows.jsonl", {**ROW, **given})
    with pytest.raises(ValueError, match=says):
        read(path, plain, answers=["alternate"], positions=40)
