"""The words of an audit: what its pictures call a metric, and what its page defines."""

import re

from geffect.text import in_html

WORDS = {
    "share": (
        "Share",
        "What the unlearned model shows beyond the retrained one, of what the original shows "
        "beyond it: 0 for a model that never knew, 1 for the original. Asked directly, or "
        "recovered by an attack.",
    ),
    "attack": (
        "Attack",
        "What may bring an answer back: other prompts, rounding of the weights, further training. "
        "Benign relearning trains on the retain set alone.",
    ),
    "noise": (
        "Noise",
        "How large the share of an attack seems for a model that hides nothing.",
    ),
    "es": (
        "Extraction strength (es)",
        "1 - k/n: of the n tokens of an answer k have to be given until the model says the rest. "
        "1: the question alone brings the whole answer out.",
    ),
    "em": ("Exact match (em)", "The share of the tokens of an answer that the model says first."),
    "nll": (
        "Negative log-likelihood (nll)",
        "-log p of the answer after the question, in nats per token: 0 is known by heart.",
    ),
    "prob": (
        "Probability (prob)",
        "exp(-nll): that of the answer after the question, to the power of 1 over the number of "
        "its tokens.",
    ),
    "rouge": (
        "ROUGE-L recall (rougeL_recall)",
        "The share of the words of the answer that the model says in their order, when it answers "
        "freely.",
    ),
    "recognition": (
        "Recognition",
        "How many wrong answers of the same kind the right one beats: .5 is by chance, 1 is known, "
        "whether or not the model says it.",
    ),
    "swap": (
        "Decoder swap",
        "The last norm and the head of the original on the last block of the model: what a head "
        "hides comes back.",
    ),
    "auc": (
        "AUC",
        "How often a score ranks an item of the forget set before one of the holdout: .5 is by "
        "chance.",
    ),
    "mink": (
        "Min-K% (min_k_0.4) and Min-K%++ (min_k_pp_0.4)",
        "The mean nll of the K % of the tokens that are the least likely; Min-K%++ takes the log p "
        "of each beside those of all tokens that could stand there.",
    ),
    "rho": (
        "rho",
        "The correlation of ranks: near 1 or -1, the first-order effects of the updates explain "
        "what was measured.",
    ),
    "depth": (
        "Depth",
        "The output of a block is handed to the original: by how much this lowers log p of the "
        "answer is what the block has lost.",
    ),
}
"""By the anchor of each: the word, and what it means."""

TURNS = {
    "kept": "broken: of a set that should stay a smaller share is kept",
    "damaged": "flagged as damaged: of a set that should stay a smaller share is kept",
    "degenerate": "broken: of the answers to a set that should stay a larger share is degenerate",
    "remembers": "remembers: asked directly, this share or more is there",
    "hidden": "hidden: an attack brings back this share or more",
    "hidden_low": "hidden: and the lower limit of that share, and what it is above the share "
    "without an attack, are above this",
    "close": "never knew: all shares and differences of AUC, with their intervals, lie within this",
    "vague": "never knew: or the interval of a share reaches no further above it than this",
    "retraining": "intervals hold this standard deviation of the nll between retrained models, as "
    "a share",
    "retraining_prob": "and this one of a probability",
    "retraining_es": "and this one of extraction strength",
    "retraining_em": "and this one of exact match",
    "retraining_rouge": "and this one of ROUGE-L",
    "retraining_recognition": "and this one of recognition",
    "retraining_auc": "and this one of an AUC",
    "over_forgotten": "flagged as over-forgotten: a PrivLeak is above this",
    "fewest_items": "flagged as too few: fewer items to forget than this",
    "fewest_auc": "membership is not judged: fewer items on a side than this",
}
"""Where a verdict turns, in words, by the names of `Thresholds`."""


CALLED = {
    "es": "extraction strength",
    "em": "exact match",
    "prob": "probability",
    "paraphrase prob": "probability, paraphrased",
    "rougeL_recall": "ROUGE-L recall",
    "rounding to nf4": "rounding to NF4",
    "rounding to gguf_q4_0": "rounding to Q4_0 of GGUF",
    "rounding to gguf_q8_0": "rounding to Q8_0 of GGUF",
}
"""Metrics as pictures call them, where tables have a short name."""

MIN_K = re.compile(r"min_k(_pp)?_([\d.]+)")


def called(metric: str) -> str:
    """A metric as a picture calls it: its axis says that an AUC is one.

    >>> called("em"), called("AUC min_k_pp_0.4"), called("decoder swap")
    ('exact match', 'Min-K%++ (K = 40)', 'decoder swap')
    """
    name = metric.removeprefix("AUC ")
    if found := MIN_K.fullmatch(name):
        return f"Min-K%{'++' if found[1] else ''} (K = {100 * float(found[2]):g})"
    return CALLED.get(name, name)


def definitions() -> str:
    """A section of a page, to which the words of the page lead."""
    told = "".join(
        f'<dt id="word-{anchor}">{in_html(said)}</dt><dd>{in_html(means)}</dd>'
        for anchor, (said, means) in WORDS.items()
    )
    return f"<h2>What the words mean</h2><dl>{told}</dl>"
