"""TRL as oracle: losses and gradients of SFT and reward model on the same rows and weights."""

from __future__ import annotations

import copy

import pytest
import torch

from align.roles import Role
from align.training.dpo import LOSSES, DirectPreference
from align.training.kto import KahnemanTversky
from align.training.objectives import LanguageModeling, Objective, Pairwise
from align.training.orpo import log_odds
from tests.tiny_chain import base, rows_folder
from tests.tiny_training import labelled_rows, lora, options, pair_rows, policy_and_reference, updater


def stock(role: Role, kind, **config):
    """The role's weights in a stock transformers model under stock peft, attached for no task in particular."""
    from peft import get_peft_model

    wanted = copy.deepcopy(role.carrier.peft_config["default"])
    wanted.task_type, wanted.exclude_modules = None, ["score"]
    theirs = get_peft_model(kind.from_pretrained(base(), dtype=torch.float32, **config), wanted)
    own = dict(role.carrier.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(own[name])
    return theirs


def compared(role: Role, theirs: torch.nn.Module) -> int:
    """Assert that LoRA gradients agree to 1e-4 of their size; returns how many were compared.

    TRL pads and sums rows in another order than ours, forwards and backwards.
    """
    other = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    count = 0
    for name, parameter in role.carrier.named_parameters():
        if parameter.requires_grad:
            gradient = other[name]
            scale = float(gradient.abs().max())
            assert scale > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * scale)
            count += 1
    return count


def test_sft_loss_and_gradients_are_trls(tmp_path):
    """TRL tokenises and masks the conversations itself."""
    import json

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from data_prep.prepare.prepare import Renderer
    from data_prep.types import Conversation, Message

    tokenizer = AutoTokenizer.from_pretrained(base())
    lines = (rows_folder() / "conversations.jsonl").read_text("utf-8").splitlines()[:12]
    talk = [json.loads(line)["messages"] for line in lines]
    renderer = Renderer(tokenizer)
    rows = [
        renderer.conversation(Conversation(tuple(Message(m["role"], m["content"]) for m in row), f"t:{i}", {}))
        for i, row in enumerate(talk)
    ]
    role = lora(seed=3)
    objective = LanguageModeling(role)
    numbers = updater(objective, options(), 1, lr=0.0).step([objective.collate(rows[i : i + 5]) for i in (0, 5, 10)])
    theirs = stock(role, AutoModelForCausalLM)
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=12,
        assistant_only_loss=True,
        max_length=None,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
    )
    data = Dataset.from_list([{"messages": row} for row in talk])
    trainer = SFTTrainer(model=theirs, args=config, train_dataset=data, processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    loss.backward()
    assert numbers["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert compared(role, trainer.model) == 28


@pytest.mark.parametrize("margins", [False, True], ids=["plain", "margins"])
def test_reward_loss_and_gradients_are_trls(margins, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    role = lora(seed=4, head=True)
    objective, rows = Pairwise(role, centering=0.03), pair_rows(8, margins)
    numbers = updater(objective, options(), 1, lr=0.0).step([objective.collate(rows[i : i + 3]) for i in (0, 3, 6)])
    theirs = stock(role, AutoModelForSequenceClassification, num_labels=1)
    head = theirs.get_base_model().score
    with torch.no_grad():
        head.weight.copy_(role.head.score.weight)
    head.weight.requires_grad_(True)
    config = RewardConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=8,
        center_rewards_coefficient=0.03,
        max_length=None,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        disable_dropout=True,
    )
    data = Dataset.from_list(
        [
            {"chosen_ids": [*row.prompt, *row.chosen], "rejected_ids": [*row.prompt, *row.rejected]}
            | ({"margin": row.margin} if margins else {})
            for row in rows
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(base())
    trainer = RewardTrainer(model=theirs, args=config, train_dataset=data, processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    trainer.model.zero_grad(set_to_none=True)
    loss.backward()
    assert numbers["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert compared(role, trainer.model) == 28
    scale = float(head.weight.grad.abs().max())
    torch.testing.assert_close(role.head.score.weight.grad, head.weight.grad, rtol=0, atol=1e-4 * scale)


def trainer_of(name: str, role: Role, folder, row: dict[str, object], **config):
    """A trainer of TRL around the role's weights, with the base under the adapter as its reference.

    It tokenises a row of text, as it can do nothing else; the rows that are compared go to its collator.
    """
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_length=None,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        **config,
    )
    tokenizer, theirs = AutoTokenizer.from_pretrained(base()), stock(role, AutoModelForCausalLM)
    below = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32)
    data = {"train_dataset": Dataset.from_list([row] * 8), "processing_class": tokenizer}
    return getattr(trl, f"{name}Trainer")(model=theirs, ref_model=below, args=chosen, **data)


def assert_agree(objective: Objective, rows: list, trainer, batch: dict[str, torch.Tensor]) -> None:
    """One loss and one gradient, ours over three micro-batches."""
    window = [objective.collate(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    numbers = updater(objective, options(), 1, lr=0.0).step(window)
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert compared(objective.role, trainer.model) == 28


def test_losses_and_gradients_of_pairs_are_trls(tmp_path):
    policy, reference = policy_and_reference(seed=5)
    row = {"prompt": "say", "chosen": " the", "rejected": " no"}
    trainer = trainer_of("DPO", policy, tmp_path, row, beta=0.4, label_smoothing=0.1)
    rows = pair_rows(8)
    given = [{"prompt_ids": r.prompt, "chosen_ids": r.chosen, "rejected_ids": r.rejected} for r in rows]
    batch = trainer.data_collator.torch_call(given)
    for name in LOSSES:
        trainer.loss_types, noise = [name], 0.0 if name == "sigmoid" else 0.1  # TRL's sigmoid knows no wrong labels
        assert_agree(DirectPreference(policy, reference, name, 0.4, noise), rows, trainer, batch)


def test_losses_and_gradients_of_labels_are_trls(tmp_path):
    """Both estimate the reference point with the reply of the row before; at this seed it is above 0."""
    policy, reference = policy_and_reference(seed=2)
    row = {"prompt": "say", "completion": " the", "label": True}
    weights = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    trainer = trainer_of("KTO", policy, tmp_path, row, **weights)
    rows = labelled_rows()
    names = {"prompt": "prompt_ids", "reply": "completion_ids", "good": "label", "other": "KL_completion_ids"}
    batch = trainer.data_collator.torch_call([{theirs: getattr(r, own) for own, theirs in names.items()} for r in rows])
    for name in ("kto", "apo_zero_unpaired"):
        trainer.loss_type, trainer.calculate_KL = name, name == "kto"
        objective = KahnemanTversky(policy, reference, name, *weights.values())
        assert_agree(objective, rows, trainer, batch)
        assert (objective.point > 0) == (name == "kto")


def test_the_odds_ratio_is_trls(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = torch.tensor([[-0.01, -2.0, -9.0], [-1.0, -0.5, -20.0]])
    self = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = ORPOTrainer.odds_ratio_loss(self, chosen, rejected)[0]
    ours = 0.3 * torch.nn.functional.logsigmoid(log_odds(chosen) - log_odds(rejected))
    torch.testing.assert_close(ours, theirs)
