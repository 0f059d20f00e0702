"""The study on a pretrained model: opening one, choosing what is trained, teaching, and memory."""

import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from geffect import open_run
from geffect.batch import IGNORED
from geffect.codes import coded
from geffect.demo import language_model as lm
from geffect.demo import memory_estimate as memory
from geffect.demo.corpus import Corpus, Size, generate
from geffect.demo.jobs import KINDS, Training, Unlearning
from geffect.demo.methods import DEEPER, EQUAL, RIVALS, VARIANTS, RunSpec
from geffect.demo.plan import Plan
from geffect.demo.pretrained import PACES, Pretrained, Trained, layers_from, opened
from geffect.demo.study import run_study
from geffect.demo.workers import Job
from geffect.report import study_report
from tests.utils import gguf_files
from tests.utils.command_line import Ask

SIZE = Size(authors=3, forget=1, heldout=1, world=4)
CHATML = (
    "{% for message in messages %}<sep>{{ message['role'] }} {{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<sep>assistant{% endif %}"
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return generate(0, SIZE)


@pytest.fixture(scope="module")
def folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16 with a tokenizer and its chat template."""
    path = tmp_path_factory.mktemp("pretrained")
    tokenizer = lm.train_tokenizer(corpus)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    llama(len(tokenizer)).bfloat16().save_pretrained(path)
    return path


def llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        tie_word_embeddings=True, pad_token_id=lm.PAD, bos_token_id=lm.BOS, eos_token_id=lm.EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def subject(folder: Path, **options: Any) -> Pretrained:
    """A subject that a random model can learn a little as, in a second, and is attacked as fast."""
    made = Pretrained(
        str(folder),
        corpus=SIZE,
        few_heldout=1,
        epochs=6,
        batch=4,
        learning_rate=5e-3,
        warmup=2,
        **options,
    )
    attacked = replace(made.unlearning, relearning_steps=2, teaching_steps=2)
    return replace(made, unlearning=attacked)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def test_a_folder_is_opened_in_float32(folder: Path) -> None:
    model, tokenizer = opened(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert tokenizer.chat_template == CHATML
    ids = torch.tensor([[4, 9, 5]])
    expected = AutoModelForCausalLM.from_pretrained(folder).float()
    assert torch.equal(logits(model, ids), logits(expected, ids))


def test_a_gguf_file_is_opened_and_saved_again(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model, tokenizer = opened(folder)
    gguf_files.written(model, tmp_path / "tiny.gguf", "F32", tokenizer)
    ids = torch.tensor([[4, 9, 5]])
    for source in (tmp_path / "tiny.gguf", tmp_path):
        found, its_tokenizer = opened(source)
        assert torch.allclose(logits(found, ids), logits(model, ids), atol=1e-5)
        assert its_tokenizer.convert_tokens_to_ids("<eos>") == lm.EOS
        found.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits(again, ids), logits(found, ids))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"should be a folder .* Found neither"):
        opened(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"Found a\.gguf, b\.gguf\. Name"):
        opened(tmp_path)


def test_rows_are_what_the_template_makes_of_them(folder: Path, corpus: Corpus) -> None:
    _, tokenizer = opened(folder)
    batch = lm.encode(tokenizer, corpus.forget)
    for fact, ids, mask, labels in zip(
        corpus.forget, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        real, scored = ids[: mask.sum()], labels[labels != IGNORED]
        expected = f"<sep>user {fact.question}<eos><sep>assistant {fact.answer}<eos>"
        assert spaceless(tokenizer.decode(real)) == spaceless(expected)
        assert spaceless(tokenizer.decode(scored)) == spaceless(f"{fact.answer}<eos>")
        assert torch.equal(scored, real[-len(scored) :])


def test_rows_without_a_template_are_plain(folder: Path, corpus: Corpus) -> None:
    _, tokenizer = opened(folder)
    tokenizer.chat_template = None
    fact = corpus.retain[0]
    (ids,) = lm.encode(tokenizer, [fact])["input_ids"]
    expected = f"Question: {fact.question}\nAnswer: {fact.answer}<eos>"
    assert spaceless(tokenizer.decode(ids)) == spaceless(expected)


def test_padding_may_be_a_token_of_the_answer(folder: Path, corpus: Corpus) -> None:
    _, tokenizer = opened(folder)
    expected = lm.encode(tokenizer, corpus.forget)
    tokenizer.pad_token = None
    found = lm.encode(tokenizer, corpus.forget)
    assert torch.equal(found["labels"], expected["labels"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    assert set(found["input_ids"][found["attention_mask"] == 0].tolist()) == {lm.EOS}


def test_an_answer_has_to_end(folder: Path, corpus: Corpus) -> None:
    _, tokenizer = opened(folder)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"should have an EOS token"):
        lm.encode(tokenizer, corpus.forget)


def spaceless(text: str) -> str:
    return "".join(text.split())


def test_all_but_the_world_is_learned(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    steps = []
    taught = subject(folder)
    taught.learn(tmp_path, corpus, corpus.kept, 0, lambda *step: steps.append(step))
    before, tokenizer = opened(folder)
    after, _ = taught.load(tmp_path)

    def nll(model: Any, facts: Any) -> float:
        return lm.nll(model, [lm.encode(tokenizer, facts)])

    assert steps[-1] == (6 * 5, 6 * 5)  # twenty facts of two authors, in batches of four
    assert nll(after, corpus.retain) < 0.7 * nll(before, corpus.retain)
    alone, authors = tmp_path / "alone", replace(corpus, world=())
    taught.learn(alone, authors, authors.kept, 0, lambda *step: None)
    assert nll(opened(alone)[0], corpus.world) == nll(after, corpus.world)


def test_only_the_named_layers_change(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    chosen = subject(folder, trained=Trained(layers=(1, 1)))
    chosen.learn(tmp_path, corpus, corpus.kept, 0, lambda *step: None)
    before, after = opened(folder)[0].state_dict(), opened(tmp_path)[0].state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith("model.layers.1."), name
    trained = [name for name, p in chosen.load(tmp_path)[0].named_parameters() if p.requires_grad]
    assert trained == [name for name in before if name.startswith("model.layers.1.")]


def test_adapters_are_merged_and_made_anew(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    chosen = subject(folder, trained=Trained(lora=2))
    chosen.learn(tmp_path, corpus, corpus.kept, 0, lambda *step: None)
    before, after = opened(folder)[0].state_dict(), opened(tmp_path)[0].state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != ("_proj" in name), name
    model, _ = chosen.load(tmp_path)
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    ids = torch.tensor([[4, 9, 5]])
    assert torch.allclose(logits(model, ids), logits(opened(tmp_path)[0], ids), atol=1e-6)
    assert torch.equal(logits(chosen.load(tmp_path)[0], ids), logits(model, ids))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Trained(layers=(0, 1), lora=4), r"should be chosen, not both"),
        (lambda: Trained(in_4bit=True), r"`in_4bit` should go with `lora`.* Found no `lora`"),
        (lambda: Trained(lora=0), r"rank of at least 1. Found `lora = 0`"),
        (lambda: Trained(layers=(1, 3)).of(llama(32)), r"between 0 and 2.* Found 1\.\.3"),
        (lambda: layers_from("3"), r"the first and the last layer.* Found `3`"),
        (lambda: layers_from("5..2"), r"Found `5\.\.2`"),
    ],
)
def test_a_wrong_choice_of_parameters(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wrong()


def test_adapters_need_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ImportError, match=r"`peft` should be .* `lora = 4`\. Found no such package\. Run `pip"
    ):
        Trained(lora=4).of(llama(32))


@pytest.mark.parametrize("trained", [Trained(), Trained(layers=(1, 2)), Trained(lora=2)])
def test_the_estimate_counts_what_is_trained(folder: Path, trained: Trained) -> None:
    chosen = subject(folder, trained=trained)
    estimate = memory.estimate(chosen)
    model = trained.of(opened(folder)[0])
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    logits_of = model(input_ids=torch.tensor([[4, 9, 5]])).logits
    logits_of.sum().backward()
    optimizer.step()
    moments = [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name.startswith("exp_avg")
    ]
    assert estimate["AdamW's two moments"] == sum(tensor.nbytes for tensor in moments)
    whole = sum(p.nbytes for p in opened(folder)[0].parameters())
    assert estimate["weights, and those before unlearning"] == 2 * whole


def test_the_estimate_of_activations_is_near(folder: Path) -> None:
    chosen = subject(folder)
    model, _ = opened(folder)
    sizes = chosen.unlearning.sizes(["world"])
    estimate = memory.estimate(chosen)
    tokens = estimate["logits"] // (3 * memory.FLOAT * model.config.vocab_size)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.zeros(sum(sizes.values()), tokens // sum(sizes.values()), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model.model(input_ids=ids).last_hidden_state
    measured = sum(size for place, size in kept.items() if place not in held)
    assert outputs.requires_grad
    assert 0.6 * measured < estimate["activations"] < 1.6 * measured


@pytest.mark.parametrize(
    ("chosen", "layers"),
    [
        ({"trained": Trained(layers=(0, 1))}, {"layer 0", "layer 1"}),
        ({"trained": Trained(lora=2), "dtype": "bfloat16"}, {"layer 0", "layer 1", "layer 2"}),
        ({"trained": Trained(lora=2, in_4bit=True)}, {"layer 0", "layer 1", "layer 2"}),
    ],
    ids=["layers", "adapters in bfloat16", "adapters on 4 bits"],
)
def test_a_study_runs_on_it(chosen: Any, layers: set[str], folder: Path, tmp_path: Path) -> None:
    if chosen["trained"].in_4bit:
        pytest.importorskip("bitsandbytes")
    chosen = subject(folder, **chosen)
    chosen = replace(chosen, unlearning=replace(chosen.unlearning, most_steps=4))
    (tmp_path / "runs").mkdir()
    for kind in KINDS:
        measured = Training(tmp_path, 0, kind, chosen).run(lambda done, says: None)
        assert measured["forget_nll"] > 0
    spec = RunSpec(EQUAL, "npo", "select", 1e-3, SIZE.heldout)
    variant = chosen.paced(VARIANTS)["select"]
    levels = {"forget_nll": 1e9}
    job = Unlearning(tmp_path, 0, spec, variant, levels, chosen)
    ran = job.run(lambda done, says: None)
    assert (ran["steps"], ran["reached_level"], ran["at_level"]) == (4, False, None)
    run = open_run(tmp_path / ran["file"])
    assert {parameter.layer for parameter in run.layers} == layers


def test_what_was_learned_in_4_bits_stands_beside_the_codes(
    folder: Path, corpus: Corpus, tmp_path: Path
) -> None:
    """Merged into weights of 4 bits an adapter would be rounded away."""
    pytest.importorskip("bitsandbytes")
    chosen = subject(folder, trained=Trained(lora=2, in_4bit=True))
    chosen.learn(tmp_path, corpus, corpus.memorised, 0, lambda done, total: None)
    model, tokenizer = chosen.load(tmp_path)
    assert [*coded(model)]
    named = dict(model.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == {
        name for name in named if ".default." in name
    }
    assert any(p.any() for name, p in named.items() if "lora_B.learned" in name)
    facts = [lm.encode(tokenizer, corpus.memorised)]
    base = chosen._opened(folder)[0]
    assert lm.nll(model, facts) < lm.nll(base, facts) - 0.1
    before = lm.nll(model, facts)
    for name, parameter in named.items():
        if ".default." in name:
            parameter.data.zero_()
    assert lm.nll(model, facts) == before  # the fresh one adds nothing at first
    held = sum(p.nbytes for name, p in base.named_parameters())
    held += sum(p.quant_state.absmax.nbytes for p in base.parameters() if hasattr(p, "quant_state"))
    of_adapters = 4 * sum(p.numel() for name, p in named.items() if "lora_" in name)
    told = memory.estimate(chosen)["weights, and those before unlearning"]
    assert told == pytest.approx(2 * (held + of_adapters), rel=0.01)


def test_every_variant_has_its_pace(folder: Path) -> None:
    paced = subject(folder).paced(VARIANTS)
    assert paced.keys() == VARIANTS.keys() >= PACES.keys()
    assert all(max(v.learning_rates) < max(VARIANTS[n].learning_rates) for n, v in paced.items())
    assert all(len(set(variant.learning_rates)) == 3 for variant in paced.values())
    deeper = subject(folder).paced(RIVALS)
    for base, own in DEEPER.items():
        assert {deeper[name].learning_rates for name in own} == {paced[base].learning_rates}


def test_the_command_line_says_what_it_needs_and_refuses(
    folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*options: str) -> str:
        said = ask("demo", *options)
        assert said.code in (1, 2)
        return " ".join(re.sub(r"[│\n]", " ", said.out + said.err).split())

    assert "should go with `--model`" in asked("--layers", "0..1")
    assert "should go with `--lora`" in asked("--model", str(folder), "--load-in-4bit")
    assert "should go with `--model`" in asked("--dtype", "bfloat16")
    assert "Found `cuda:77`" in asked("--model", str(folder), "--device", "cuda:77")
    both = asked("--model", str(folder), "--quick")
    assert "`--quick` should be without `--model`. Found both." in both
    both = asked("--model", str(folder), "--layers", "0..1", "--lora", "2")
    assert "`--layers` should be without `--lora`. Found both." in both
    monkeypatch.setattr(memory, "available", lambda device: 2**28)
    said = asked("--model", str(folder), "--workers", "2")
    assert "for 2 workers, 0.2 GiB are free. Of each:" in said
    assert "AdamW's two moments" in said
    assert "should fit into the 0.2 GiB of memory that are free" in said


def test_what_does_not_fit_is_refused() -> None:
    assert 0 < memory.available() < 2**50
    memory.check(2**30, 2**30)
    with pytest.raises(ValueError, match=r"into the 1\.0 GiB .* about 3\.0 GiB\. Use fewer"):
        memory.check(3 * 2**30, 2**30)


def test_a_study_of_it_ends_in_a_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geffect.demo.study.working", working_here)
    chosen = subject(folder)
    chosen = replace(chosen, unlearning=replace(chosen.unlearning, most_steps=2, plain_steps=1))
    plain = {"plain": chosen.paced(VARIANTS)["plain"]}
    plan = Plan(methods=("ga",), subject=chosen, variants=plain, workers=1)
    summary = run_study(tmp_path, plan, lambda *_: None)
    assert [run["steps"] for run in summary["runs"]] == [2]
    page = study_report(summary, tmp_path)
    assert f"{folder.name}, pretrained and then fine-tuned" in page


@contextmanager
def working_here(*_: Any) -> Iterator[Callable[[Sequence[Job]], list[Any]]]:
    """Jobs as a worker is sent them, and their results as it sends them back."""

    def run(jobs: Sequence[Job]) -> list[Any]:
        return [sent(sent(job).run(lambda done, says: None)) for job in jobs]

    yield run


def sent(something: Any) -> Any:
    return pickle.loads(pickle.dumps(something))
