"""The arguments of an unlearning that a plain loop can follow."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

LR, BATCH, WINDOW, EPOCHS, SEED = 1e-2, 2, 3, 2, 3


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """SGD for a naive loop to follow, without what is not under test."""
    usual: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": WINDOW,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": SEED,
    }
    return TrainingArguments(**usual | options)
