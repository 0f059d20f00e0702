"""What a study measures of a run at a level, in words, and the columns in which tables show it."""

AT_LEVEL = {
    "step": "step at the level",
    "retain_nll": "retain NLL",
    "retain_heldout_authors_nll": "retain NLL of authors outside the retain gradient",
    "world_nll": "world facts NLL",
    "forget_nll": "forget NLL",
    "forget_es": "forget extraction strength",
    "retain_es": "retain extraction strength",
    "forget_paraphrase_nll": "forget NLL, unseen paraphrases",
    "relearn_nll": "forget NLL, mostly of names and templates, after relearning the other half",
    "value_nll": "NLL of the values to forget",
    "recognition": "recognition of the values to forget",
    "recognition_taught": "recognition of the values to forget after the others were taught",
    "recognition_retain": "recognition of the values to forget after training on retain text",
    "recognition_strongest": "recognition of the values to forget after the strongest attack",
    "savings": "recognition of the values to forget after a few steps on them",
    "audit_benign": "share of what was known that comes back by training on what stays",
    "audit_swap": "share of what was known that the original's decoder tells",
    "audit_int4": "share of what was known that comes back by rounding to 4 bits",
    "audit_most": "share of what was known that comes back by the strongest attack",
    "audit_attack": "the strongest attack",
    "verdict": "what an audit says",
}
"""What is measured at a level, with its name in words."""

KEYS = {
    "method": ("method", "{}"),
    "variant": ("variant", "{}"),
    "retain_feed": ("retain QA", "{}"),
    "learning_rate": ("learning rate", "{:g}"),
}
"""What tells the rows of a table apart, with its heading and how it is written."""

COLUMNS = {
    "step": ("steps", "{:.0f}"),
    "retain_nll": ("retain NLL inside", "{:.3f}"),
    "retain_heldout_authors_nll": ("outside", "{:.3f}"),
    "world_nll": ("world facts NLL", "{:.3f}"),
    "retain_es": ("retain ES", "{:.2f}"),
    "forget_nll": ("forget NLL", "{:.2f}"),
    "forget_es": ("forget ES", "{:.2f}"),
    "forget_paraphrase_nll": ("paraphrases NLL", "{:.2f}"),
    "relearn_nll": ("names relearned NLL", "{:.2f}"),
    "value_nll": ("value NLL", "{:.2f}"),
    "recognition": ("recognition", "{:.2f}"),
    "recognition_taught": ("others taught", "{:.2f}"),
    "recognition_retain": ("retain text", "{:.2f}"),
    "recognition_strongest": ("strongest teaching", "{:.2f}"),
    "savings": ("savings", "{:.2f}"),
    "share_update_violating": ("violating steps", "{:.2f}"),
    "audit_benign": ("comes back (benign)", "{:.2f}"),
    "audit_swap": ("decoder swap", "{:.2f}"),
    "audit_int4": ("int4", "{:.2f}"),
    "audit_most": ("strongest attack", "{:.2f}"),
    "verdict": ("verdict", "{}"),
}
"""What is shown of each row: means over seeds."""

PROBED = (
    "value_nll",
    "recognition",
    "recognition_taught",
    "recognition_retain",
    "recognition_strongest",
    "savings",
)
"""What is asked of the values to forget."""

PRINTED = tuple(
    name for name in COLUMNS if name not in {"retain_es", *PROBED} - {"recognition_taught"}
)
"""The columns for which a terminal is wide enough; those of an audit where there was one."""

OF_AN_AUDIT = tuple(name for name in COLUMNS if name.startswith("audit_") or name == "verdict")

WORDS = ("audit_attack", "verdict")
"""What is told in words, of which there is no mean."""

OF_DEPTH = (
    "step",
    "retain_nll",
    "retain_heldout_authors_nll",
    "world_nll",
    "forget_nll",
    "forget_es",
    *PROBED,
)
"""The columns of tables that tell forgetting from hiding."""

OF_ONE_FEED = ("relearn_nll", *PROBED)
"""What is measured of a model once, whatever feeds the retain gradient."""
