"""transformers' Trainer, with nothing of an adapter lost."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
import transformers
from lora_lite_transformers import adapted, trainer
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .conftest import TARGETS, Held, arguments, rows, same, state

Make = Callable[..., tuple[Any, ll.Adapter]]
FIELDS = {
    "lora": {"r": 2, "dropout": 0.1},
    "dora": {"r": 2},
    "hra": {"r": 2, "reg": 0.1},
    "pissa": {"r": 2},
    "antipasto": {"r": 8},
}


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


# --- what a variant asks for


def test_weight_decay_goes_where_the_variant_wants_it(make: Make) -> None:
    """The optimizer's groups follow `TensorSpec.decay`, and hold the adapter alone."""
    built, adapter = make(Held())
    optimizer = built.create_optimizer()
    by_decay = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    named = dict(adapter.named_parameters())
    for decay, tensor in ((0.1, "u"), (0.0, "v")):
        expected = {id(p) for name, p in named.items() if name.endswith(f".{tensor}")}
        assert {id(p) for p in by_decay[decay]} == expected


def test_names_that_look_like_norms_decay_all_the_same(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """The Trainer guesses from names; an adapter says it."""
    model = tiny_llama()
    model.norm = nn.ModuleDict({"bias_proj": nn.Linear(4, 4)})
    ll.attach(model, "lora", r=2, targets="bias_proj")
    built = adapted(Trainer)(model, args=arguments(tmp_path), train_dataset=rows())
    names = built.get_decay_parameter_names(model)
    assert {n for n in names if "lora" in n and not n.endswith("_")} >= {
        "norm.bias_proj.lora_default_A",
        "norm.bias_proj.lora_default_B",
    }


def test_parameters_are_projected_after_every_step(make: Make) -> None:
    """At each step's end they are in the allowed set, for the model that is evaluated and saved."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            largest = [p.max().item() for n, p in adapter.named_parameters() if n.endswith(".v")]
            seen.append(max(largest))

    built, adapter = make(Held(most=0.001), callbacks=[Watch()])
    built.train()
    assert len(seen) == 6
    assert max(seen) == pytest.approx(0.001)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("counts_items", [True, False])
def test_the_penalty_counts_once_an_update(
    make: Make, accumulation: int, counts_items: bool
) -> None:
    """Its gradient is 1, so SGD moves u by the learning rate, whatever the accumulation, and
    whether or not the Trainer divides the loss itself.
    """
    built, adapter = make(
        Held(),
        optim="sgd",
        learning_rate=0.5,
        weight_decay=0.0,
        max_grad_norm=0.0,
        max_steps=1,
        lr_scheduler_type="constant",
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
    )
    built.model_accepts_loss_kwargs = counts_items
    built.train()
    for name, value in adapter.named_parameters():
        if name.endswith(".u"):
            torch.testing.assert_close(value.detach(), torch.full((3,), 0.5))


def test_the_penalty_is_not_in_the_evaluation(make: Make) -> None:
    """`eval_loss` is the model's loss, comparable between methods."""
    built, adapter = make(Held(), eval_dataset=rows(4))
    with_penalty = built.evaluate()["eval_loss"]
    with torch.no_grad():
        for name, value in adapter.named_parameters():
            if name.endswith(".u"):
                value.fill_(100.0)
    assert built.evaluate()["eval_loss"] == with_penalty


# --- checkpoints


@pytest.mark.parametrize("variant", FIELDS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_ends_in_the_same_bits(make: Make, variant: str, accumulation: int) -> None:
    """Interrupted after any checkpoint and resumed: the losses and tensors of the run in one go."""
    options = {"fields": FIELDS[variant], "gradient_accumulation_steps": accumulation}
    whole, adapter = make(variant, **options)
    whole.train()
    for step in (2, 4):
        resumed, again = make(variant, **options)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert same(state(again), state(adapter))
        assert losses(resumed) == losses(whole)


def test_checkpoints_hold_adapters_and_not_the_model(make: Make) -> None:
    """No file of the model, one for each adapter; `load` reads it onto the base."""
    built, adapter = make(fields={"r": 2})
    built.train()
    checkpoint = Path(built.args.output_dir) / "checkpoint-6"
    expected = {"adapters.json", "default.adapter.safetensors", "training_args.bin"}
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert {file.name for file in checkpoint.iterdir()} == expected | states
    built.save_model()
    saved = state(adapter)
    adapter.detach()
    for folder in (checkpoint, checkpoint.parent):
        loaded = ll.load(built.model, folder / "default.adapter.safetensors")
        assert same(state(loaded), saved)
        loaded.detach()


@pytest.mark.parametrize("best", [False, True])
def test_a_finished_run_that_is_resumed_takes_no_step_more(make: Make, best: bool) -> None:
    """Its tensors are those that it ended with, or those of the best checkpoint if asked for; the
    callbacks see an end.
    """
    ends = []

    class Watch(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            ends.append(1)

    options: dict[str, Any] = {"max_steps": 3, "save_steps": 1}
    if best:
        evaluated = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
        options |= {**evaluated, "eval_dataset": rows()}
    whole, adapter = make(**options)
    whole.train()
    resumed, again = make(**options, callbacks=[Watch()])
    output = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == 3
    assert resumed.state.global_step == 3
    assert ends == [1]
    assert same(state(again), state(adapter))


def test_what_trains_beside_the_adapter_is_resumed_too(make: Make) -> None:
    """A norm that the user trains as well is in the checkpoint, and comes back to the bit."""

    def start() -> tuple[Trainer, ll.Adapter]:
        built, adapter = make(fields={"r": 2})
        built.model.model.norm.weight.requires_grad_(True)
        return built, adapter

    whole, _ = start()
    whole.train()
    resumed, _ = start()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    norms = [built.model.model.norm.weight for built in (whole, resumed)]
    assert torch.equal(*norms)
    assert not torch.equal(norms[0], torch.ones_like(norms[0]))
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 2, "alpha": 64.0}, "alpha=16.0 in the file, alpha=64.0 in the model"),
        ({"r": 2, "name": "other"}, "holds the adapters 'default', and the model has 'other'"),
        ({"r": 2, "layers": 0}, r"model\.layers\.1\.mlp\.down_proj: only in the file"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    make: Make, fields: dict[str, Any], words: str
) -> None:
    """Other fields, another name, other layers: an error before the first step, not another run."""
    whole, _ = make(fields={"r": 2}, max_steps=2)
    whole.train()
    other, adapter = make(fields=fields)
    before = state(adapter)
    with pytest.raises(ll.AdapterFileError, match=words):
        other.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert same(state(adapter), before)


@pytest.mark.parametrize(
    "lost",
    [
        "adapters.json",
        "default.adapter.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    ],
)
def test_an_incomplete_checkpoint_is_not_resumed_from(make: Make, lost: str) -> None:
    """As a killed process leaves it. `True` means the last whole one, with the same end."""
    whole, adapter = make(fields={"r": 2})
    whole.train()
    last = Path(whole.args.output_dir) / "checkpoint-6"
    file = last / lost
    file.write_bytes(file.read_bytes()[:20] if lost == "trainer_state.json" else b"")
    if lost != "trainer_state.json":
        file.unlink()
    resumed, again = make(fields={"r": 2})
    with pytest.raises(ll.LoraLiteError, match=r"not a whole checkpoint|damaged"):
        resumed.train(resume_from_checkpoint=str(last))
    resumed, again = make(fields={"r": 2})
    if lost == "default.adapter.safetensors":
        shutil.rmtree(last)
    resumed.train(resume_from_checkpoint=True)
    assert same(state(again), state(adapter))
    assert losses(resumed) == losses(whole)


def test_the_best_checkpoint_is_loaded_at_the_end(make: Make) -> None:
    """With `load_best_model_at_end` the model ends with the adapters of the best evaluation."""
    built, adapter = make(
        fields={"r": 2},
        eval_dataset=rows(4),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is not the last one
    )
    built.train()
    best = built.state.best_model_checkpoint
    evaluations = [e["eval_loss"] for e in built.state.log_history if "eval_loss" in e]
    assert best.endswith(f"checkpoint-{2 * (1 + evaluations.index(max(evaluations)))}")
    assert not best.endswith("checkpoint-6")
    assert built.evaluate()["eval_loss"] == max(evaluations)
    ended = state(adapter)
    adapter.detach()
    assert same(state(ll.load(built.model, f"{best}/default.adapter.safetensors")), ended)


def test_pushed_checkpoints_are_adapters(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded holds the adapters' files and nothing of the model. The hub is not here, so
    the upload is looked at instead.
    """
    built, _ = make(fields={"r": 2}, max_steps=2)
    built.train()
    pushed: list[set[str]] = []

    class Hub:
        def upload_folder(self, folder_path: str, **_: Any) -> None:
            pushed.append({file.name for file in Path(folder_path).iterdir()})

    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    else:  # an older transformers
        monkeypatch.setattr("transformers.trainer.upload_folder", Hub().upload_folder)
    built.push_in_progress, built.hub_model_id = None, "someone/something"
    built._push_from_checkpoint(f"{built.args.output_dir}/checkpoint-2")
    assert pushed[0] >= {"adapters.json", "default.adapter.safetensors"}
    assert not any(name.startswith(("model", "pytorch_model")) for name in pushed[0])


# --- the trainer's class


def test_overridden_private_methods_are_there_with_the_same_parameters() -> None:
    """A transformers that renames or changes one is seen here, and not in a user's checkpoint."""
    for name, parameters in trainer.PRIVATE.items():
        assert tuple(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters
    own = {name for name in vars(trainer._Adapted) if not name.startswith("__")}
    public = {name for name in own if not name.startswith("_")}
    private = {name for name in own - public if hasattr(Trainer, name)}
    assert private == set(trainer.PRIVATE)
    assert all(hasattr(Trainer, name) for name in public)


def test_attributes_of_the_trainer_that_the_penalty_reads_are_there(make: Make) -> None:
    """They decide whether the Trainer divides the loss by the number of micro-batches."""
    built, _ = make(fields={"r": 2}, max_steps=1, save_strategy="no")
    built.train()
    assert isinstance(built.model_accepts_loss_kwargs, bool)
    assert built.compute_loss_func is None
    assert built.current_gradient_accumulation_steps == 1


def test_the_adapted_class_is_a_subclass_made_once() -> None:
    """`isinstance` works, and two calls give the same class."""
    assert adapted(Trainer) is adapted(Trainer)
    assert issubclass(adapted(Seq2SeqTrainer), Seq2SeqTrainer)


def test_a_model_without_an_adapter_is_refused(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """The plain Trainer would train the whole model."""
    with pytest.raises(ll.AdapterError, match="has no adapter to train"):
        adapted(Trainer)(tiny_llama(), args=arguments(tmp_path), train_dataset=rows())


def test_gradient_checkpointing_changes_no_bit(make: Make) -> None:
    """Losses and tensors are those of the run without it."""
    plain, adapter = make(fields={"r": 2}, save_strategy="no")
    plain.train()
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    again, other = make(fields={"r": 2}, save_strategy="no", **{name: True})
    again.train()
    assert losses(again) == losses(plain)
    assert same(state(other), state(adapter))


def test_bfloat16_keeps_the_adapter_in_float32(make: Make) -> None:
    """`bf16=True` computes in bfloat16; parameters, their state and the files stay in float32."""
    built, adapter = make(fields={"r": 2}, bf16=True, max_steps=2)
    built.train()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    resumed, again = make(fields={"r": 2}, bf16=True, max_steps=4)
    resumed.train(resume_from_checkpoint=f"{built.args.output_dir}/checkpoint-2")
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_seq2seq_trainer(tmp_path: Path) -> None:
    """An encoder-decoder, evaluated by generating: checkpoints and resuming as with Trainer."""
    from transformers import T5Config, T5ForConditionalGeneration

    def start() -> tuple[Any, ll.Adapter]:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
        adapter = ll.attach(model, "lora", r=2, targets=r"(q|v)$")
        plain = arguments(tmp_path, max_steps=4)
        args = Seq2SeqTrainingArguments(
            **{**plain.to_dict(), "predict_with_generate": True, "generation_max_length": 4}
        )
        built = adapted(Seq2SeqTrainer)(
            model, args=args, train_dataset=rows(), eval_dataset=rows(4)
        )
        return built, adapter

    whole, adapter = start()
    whole.train()
    assert "eval_loss" in whole.evaluate()
    resumed, again = start()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert same(state(again), state(adapter))


def test_a_quantised_base_is_taken(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    """A 4-bit model trains with the one changed line, and carries no flag of it afterwards."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("lora_lite_bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def start() -> tuple[Any, ll.Adapter]:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map="cpu"
        )
        adapter = ll.attach(model, "lora", r=2, targets=TARGETS)
        args = arguments(tmp_path / "run", max_steps=4)
        return adapted(Trainer)(model, args=args, train_dataset=rows()), adapter

    whole, adapter = start()
    assert "_hf_peft_config_loaded" not in vars(whole.model)
    whole.train()
    resumed, again = start()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/run/checkpoint-2")
    assert same(state(again), state(adapter))
