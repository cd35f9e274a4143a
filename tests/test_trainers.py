"""The trainers of TRL and sentence-transformers, and Lightning: nothing lost, everything resumed.

transformers' own trainers are tested in plugins/transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_benchmark.tiny import MODEL_DIR
from lora_lite_transformers import Reference, adapted
from torch import Tensor, nn

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

TARGETS = r"down_proj$"
LN2 = 0.6931
# What TRL and datasets say of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def base(**options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, **options)


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


def attached(model: nn.Module, variant: str = "lora", *, was_trained: bool = False) -> ll.Adapter:
    adapter = ll.attach(model, variant, r=2, targets=TARGETS)
    if was_trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapter


def state(adapter: ll.Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[name], expected[name]) for name in actual
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
        "seed": 0,
        **changes,
    }


def pairs() -> Any:
    return datasets.Dataset.from_list(
        [
            {"prompt": f"fact {i} is", "chosen": f" {i * 7 % 13}.", "rejected": " wrong."}
            for i in range(8)
        ]
    )


def sft(folder: Path, **changes: Any) -> tuple[Any, ll.Adapter]:
    model = base()
    adapter = attached(model, "dora")
    texts = [{"text": f"fact {i} is {i * 7 % 13}."} for i in range(8)]
    args = trl.SFTConfig(**options(folder, **changes))
    trainer = adapted(trl.SFTTrainer)(
        model,
        args=args,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer(),
    )
    return trainer, adapter


def dpo(folder: Path, *, was_trained: bool = False, **changes: Any) -> tuple[Any, ll.Adapter]:
    model = base()
    adapter = attached(model, was_trained=was_trained)
    args = trl.DPOConfig(**options(folder, **changes))
    trainer = adapted(trl.DPOTrainer)(
        model, args=args, train_dataset=pairs(), processing_class=tokenizer()
    )
    return trainer, adapter


def reward(folder: Path) -> tuple[Any, ll.Adapter]:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL_DIR, dtype=torch.float32, num_labels=1
    )
    with pytest.warns(ll.AdapterWarning, match="score"):
        adapter = attached(model)
    model.get_submodule("score").requires_grad_(True)  # the head is new, and trains beside it
    args = trl.RewardConfig(**options(folder))
    trainer = adapted(trl.RewardTrainer)(
        model, args=args, train_dataset=pairs(), processing_class=tokenizer()
    )
    return trainer, adapter


def grpo(folder: Path, *, beta: float = 0.1, **changes: Any) -> tuple[Any, ll.Adapter]:
    model = base()
    adapter = attached(model, was_trained=True)
    generation = {"num_generations": 2, "max_completion_length": 8, "temperature": 3.0}
    args = trl.GRPOConfig(
        **options(folder, beta=beta, max_steps=2, save_steps=1, **generation, **changes)
    )
    trainer = adapted(trl.GRPOTrainer)(
        model,
        args=args,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        train_dataset=pairs().select_columns(["prompt"]),
        processing_class=tokenizer(),
    )
    return trainer, adapter


@pytest.mark.parametrize("start", [sft, dpo, reward, grpo])
def test_a_resumed_run_ends_in_the_same_bits(start: Callable[..., Any], tmp_path: Path) -> None:
    """Checkpoints without the model, from which every trainer goes on exactly."""
    whole, adapter = start(tmp_path)
    whole.train()
    first = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert not [file for file in first.iterdir() if file.name.startswith(("model", "pytorch"))]
    resumed, again = start(tmp_path)
    resumed.train(resume_from_checkpoint=str(first))
    assert same(state(again), state(adapter))
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("was_trained", [False, True])
@pytest.mark.parametrize("precomputes", [False, True])
def test_dpo_starts_at_the_policy(tmp_path: Path, was_trained: bool, precomputes: bool) -> None:
    """The first loss is ln 2, also when training starts from an adapter; there is no second model;
    and every loss is, to the bit, that of the run with a full copy as reference.
    """
    trainer, adapter = dpo(
        tmp_path / "a",
        was_trained=was_trained,
        precompute_ref_log_probs=precomputes,
        save_strategy="no",
    )
    assert isinstance(trainer.ref_model, Reference)
    assert not list(trainer.ref_model.parameters())
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-4)

    model = base()
    other = attached(model, was_trained=was_trained)
    full = copy.deepcopy(model).eval().requires_grad_(False)
    args = trl.DPOConfig(**options(tmp_path / "b", save_strategy="no"))
    with_copy = trl.DPOTrainer(
        model, ref_model=full, args=args, train_dataset=pairs(), processing_class=tokenizer()
    )
    with_copy.train()
    assert losses(trainer) == losses(with_copy)
    assert same(state(adapter), state(other))


def test_dpo_keeps_a_reference_that_is_given(tmp_path: Path) -> None:
    """A second model, if the user wants one."""
    model = base()
    attached(model)
    args = trl.DPOConfig(**options(tmp_path))
    full = base()
    trainer = adapted(trl.DPOTrainer)(
        model, ref_model=full, args=args, train_dataset=pairs(), processing_class=tokenizer()
    )
    assert trainer.ref_model is full


def test_grpo_compares_with_the_policys_start(tmp_path: Path) -> None:
    """The divergence is 0 at the first step, from an adapter that was trained before, and `beta`
    is the user's.
    """
    trainer, _ = grpo(tmp_path, beta=0.3)
    assert isinstance(trainer.ref_model, Reference)
    assert (trainer.beta, trainer.args.beta) == (0.3, 0.3)
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences[0] == 0.0
    assert divergences[1] > 0.0


@pytest.mark.parametrize("start", [dpo, grpo])
def test_a_reference_that_follows_the_policy_is_refused(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    """TRL would copy nothing into a module without parameters, and say nothing."""
    with pytest.raises(ll.AdapterError, match="sync_ref_model"):
        start(tmp_path, sync_ref_model=True)


# --- sentence-transformers


def test_sentence_transformers(tmp_path: Path) -> None:
    """Resumed to the same bits, from checkpoints without the model; the model still encodes."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses as st_losses

    texts = [f"fact {i}" for i in range(8)]
    columns = {"anchor": texts, "positive": [f"{text} is {i % 3}" for i, text in enumerate(texts)]}

    def start() -> tuple[Any, ll.Adapter]:
        torch.manual_seed(0)
        model = st.SentenceTransformer(str(MODEL_DIR), device="cpu")
        adapter = ll.attach(model, "lora", r=2, targets=TARGETS)
        args = st.SentenceTransformerTrainingArguments(
            **{k: v for k, v in options(tmp_path).items() if k != "activation_checkpointing"}
        )
        trainer = adapted(st.SentenceTransformerTrainer)(
            model,
            args=args,
            train_dataset=datasets.Dataset.from_dict(columns),
            loss=st_losses.MultipleNegativesRankingLoss(model),
        )
        return trainer, adapter

    whole, adapter = start()
    whole.train()
    assert not list((tmp_path / "checkpoint-2").rglob("model*"))
    resumed, again = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(state(again), state(adapter))
    assert losses(resumed) == losses(whole)
    assert (whole.model.encode(texts) == resumed.model.encode(texts)).all()


# --- Lightning


def lightning_run(epochs: int, resume: str | None = None, **fields: int) -> Any:
    """A module with an adapter, trained for some epochs; its adapter and the trainer."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lora_lite_transformers.lightning import AdapterCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            loss = (self.model(batch) - batch.flip(-1)).square().mean()
            return loss + adapter.penalty()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(ll.param_groups(self, 0.1), lr=1e-2)

    module = Module()
    adapter = ll.attach(module, "hra", targets=r"model", **{"r": 2, **fields})
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[AdapterCheckpoint()],
    )
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=False)
    return adapter, trainer


def test_lightning_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """From a checkpoint that holds what training has changed, and nothing else of the model."""
    _, trainer = lightning_run(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=False)["state_dict"]
    assert saved
    assert all("lora_default_" in name for name in saved)
    whole, _ = lightning_run(2)
    resumed, _ = lightning_run(2, str(tmp_path / "first.ckpt"))
    assert same(state(resumed), state(whole))


def test_lightning_refuses_the_checkpoint_of_another_adapter(tmp_path: Path) -> None:
    """Other fields of the same shapes, and a checkpoint without the adapter."""
    _, trainer = lightning_run(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ll.AdapterError, match="another adapter 'default'"):
        lightning_run(2, str(tmp_path / "first.ckpt"), reg=1.0)
    checkpoint = torch.load(tmp_path / "first.ckpt", weights_only=False)
    checkpoint["state_dict"] = {}
    torch.save(checkpoint, tmp_path / "empty.ckpt")
    with pytest.raises(ll.AdapterFileError, match="lacks 3 tensors"):
        lightning_run(2, str(tmp_path / "empty.ckpt"))
