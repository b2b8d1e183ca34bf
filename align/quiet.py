"""Third-party chatter kept off the screen: progress bars, start-up notes and warnings that a user cannot act on."""

from __future__ import annotations

import logging
import os
import warnings

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "BITSANDBYTES_NOWELCOME": "1",
    "WANDB_SILENT": "true",
}
"""Environment of libraries that talk too much; what the user has set stays."""
LOGGERS = ("transformers", "peft", "accelerate", "bitsandbytes")


def quieten() -> None:
    """Keep libraries from writing over progress and verdicts."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
