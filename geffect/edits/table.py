"""The page of the documentation that lists the catalogue: `python -m geffect.edits.table`."""

import inspect
import sys

from .base import Edit
from .catalogue import CATALOGUE, options_of

HEAD = """\
# Edits

An edit changes the parameters of a model at once, without training. Its displacement D, the new
parameters minus the old ones, is profiled like a step of training: to first order a risk R falls by
e_R(D) = -<grad R, D>, layer by layer. So edits and trained methods compare.

```sh
geffect edit run/checkpoint-10 --method ssd --fraction 0.01 \\
    --forget forget.jsonl --retain retain.jsonl -o edited
geffect report edited/edit.h5 -o edited.html
```

An option is a field of the class: `--alpha 5`, `--edit-option alpha=5`, `SSD(alpha=5.0)`. The
command and `geffect.edit(model, output, "ssd", forget=..., retain=...)` copy a model into a new
folder. A model that is loaded is edited in place, and given back:

```python
import geffect
from geffect.analysis import edited
from geffect.edits import SSD

data = {"forget": forget_batches, "retain": retain_batches}
change = SSD(fraction=0.01).change(model, data)  # nothing is changed yet
run = geffect.record_edit(model, change, "edit.h5", risks=data)
edited(run, by="layer")  # predicted and measured fall of each risk, |D|, the part that is touched
with change:  # made here, and taken back to the bit afterwards, whatever is raised inside
    model(**forget_batches[0])
change.apply()  # or kept, until change.revert()
```

- A **run file** of an edit has one step, at the parameters before it. The source `update` is D, and
  `objective` is -D: the edit is one step of gradient descent of rate 1, and its G-effects are
  e_R(D). `geffect scores`, `plot` and `report` read it like any other run.
- **Measured** is the fall of the risk itself. Where it differs much from what is predicted, the
  edit is too large for first order: the layers then tell directions, and no amounts.
- **Adapters**: an edit of a model of PEFT changes the factors of its adapters, in adapter space.
  With `merge` it changes the merged weights, and a whole model is saved. The run says which.
- Tied tensors are changed once. Values are rounded to the type of the parameter, and D is what the
  model moves by then. An edit is made in one process that holds the whole model.
- **Importances** of SSD are means over batches of one size, the same for both sets: the squared
  gradient of a batch of B rows is mu^2 + sigma^2 / B on average. The run says B, the reduction, and
  how many batches there were. A small forget set has a noisier one, of which more is selected.
- The `alpha` of SSD does not carry over from one model to another. `fraction` says how much is
  selected, on any.

- **Newton** is not called certified: no noise is added, and no bound is known. Its scale has to
  exceed half of the largest curvature, its damping the most negative one; the edit is refused where
  the solve shows otherwise. Second derivatives are held against differences of gradients, along
  the gradient and along the step, and refused where a backward pass leaves them out.

How strong an edit has to be for a metric to reach a level is found by bisection, here until the
forget loss is 4 nats per token:

```python
from geffect.edits import Varied
from geffect.risk import mean_nll

varied = Varied.of(SSD(), "fraction", model, data)
found = varied.reaching(
    lambda edited: mean_nll(edited, forget_batches), level=4.0, between=(1e-5, 0.5)
)
if found.value is not None:  # else no fraction reaches it
    varied.change(found.value).apply()
```

[The study of all methods](comparison.md) compares edits with training so.

Sets are data that an edit is made from, states other models, as `--state tuned=DIR` or
`states={"tuned": folder}`.

`ClosedFormLinear` is not in the list: it is made of inputs of one layer, which no file holds. From
Python it is an edit like the others, `layer_inputs` takes the inputs from batches, and
`derived_input` finds the one that brings a concept back that was erased (RECE).

This page is written by `python -m geffect.edits.table > docs/edits.md`.
"""

COLUMNS = ("name", "class", "what it does", "options", "sets", "states", "source")


def page() -> str:
    """The page, with a row for each name."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [_row(name, edit) for name, edit in CATALOGUE.items()]
    return "\n".join([HEAD, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _row(name: str, edit: Edit) -> tuple[str, ...]:
    summary = (inspect.getdoc(type(edit)) or "").splitlines()[0]
    options = [f"`{option}` {value!r}" for option, value in options_of(edit).items()]
    return (
        f"`{name}`",
        f"`{type(edit).__name__}`",
        summary.replace("|", r"\|"),
        ", ".join(options) or "none",
        ", ".join(edit.sets) or "none",
        ", ".join(edit.states) or "none",
        edit.source,
    )


if __name__ == "__main__":
    sys.stdout.write(page())
