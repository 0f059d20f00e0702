"""The words of an audit, as its page defines them."""

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
    "auc": (
        "AUC",
        "How often a score ranks an item of the forget set before one of the holdout: .5 is by "
        "chance.",
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


def definitions() -> str:
    """A section of a page, to which the words of the page lead."""
    told = "".join(
        f'<dt id="word-{anchor}">{in_html(said)}</dt><dd>{in_html(means)}</dd>'
        for anchor, (said, means) in WORDS.items()
    )
    return f"<h2>What the words mean</h2><dl>{told}</dl>"
