"""Run by torchrun in test_trainers_distributed.py: trains under the Trainer, with accelerate, and
by hand, with DDP and FSDP2, and writes what each process saw.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import torch
import torch.distributed as dist
from lora_lite_transformers import adapted
from torch import Tensor, nn
from two_processes import leave

ROWS, STEPS = 16, 4


def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens() -> Tensor:
    return torch.randint(2, 32, (ROWS, 8), generator=torch.Generator().manual_seed(0))


def options(folder: Path, mode: str, block: str) -> dict[str, Any]:
    """Of a run of four steps of four rows, whatever the number of processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    several: dict[str, Any] = {"ddp_backend": "gloo"} if world > 1 else {}
    if mode.endswith("fsdp"):
        wrap = {"version": 2, "transformer_layer_cls_to_wrap": [block]}
        several |= {"fsdp": True, "fsdp_config": {"reshard_after_forward": True, **wrap}}
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 4 // world, "max_steps": STEPS,
        "save_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
        "seed": 0, **several,
    }  # fmt: skip


def trained(folder: Path, mode: str, resume: str | None = None) -> tuple[Any, ll.Adapter]:
    """Four steps with the Trainer."""
    from transformers import Trainer, TrainingArguments

    model = tiny()
    adapter = ll.attach(model, "hra", r=2, reg=0.1, targets=r"down_proj$", seed=3)
    args = TrainingArguments(**options(folder, mode, "LlamaDecoderLayer"))
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    trainer = adapted(Trainer)(model, args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, adapter


def compared(folder: Path, mode: str, resume: str | None = None) -> tuple[Any, ll.Adapter]:
    """Four steps of DPO, from an adapter that was trained before."""
    import datasets
    import trl
    from lora_lite_benchmark.tiny import MODEL_DIR
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    adapter = ll.attach(model, "lora", r=2, targets=r"down_proj$")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    rows = [
        {"prompt": f"fact {i} is", "chosen": f" {i * 7 % 13}.", "rejected": " wrong."}
        for i in range(8)
    ]
    changes = {"bf16": False, "activation_checkpointing": False}
    args = trl.DPOConfig(**options(folder, mode, type(model.model.layers[0]).__name__), **changes)
    trainer = adapted(trl.DPOTrainer)(
        model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, adapter


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_trainer(folder: Path, mode: str) -> None:
    """In one go, and resumed from the second step."""
    run = compared if mode.startswith("dpo") else trained
    whole, adapter = run(folder, mode)
    record = {"whole": losses(whole), "state": adapter.state_dict()}
    resumed, again = run(folder, mode, str(folder / "checkpoint-2"))
    record |= {"resumed": losses(resumed), "resumed_state": again.state_dict()}
    torch.save(record, folder / f"record{dist.get_rank()}")


def steps(
    model: Any,
    optimizer: Any,
    batches: Tensor,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> list[float]:
    """A step for each batch, of which every process takes its rows; the losses of this process."""
    seen = []
    for batch in batches:
        mine = batch[dist.get_rank() :: dist.get_world_size()]
        loss = model(input_ids=mine, labels=mine).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def by_hand(folder: Path) -> None:
    """fully_shard, an optimizer and a loop of one's own; two adapters, a penalty, a projection."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny()
        ll.attach(model, "hra", r=2, targets=r"down_proj$")
        ll.attach(model, "dora", r=2, targets=r"q_proj$", name="other")
        held = ll.attach(model, "antipasto_ablate", r=8, k=2, targets=r"o_proj$", name="held")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(ll.param_groups(model, lr={"alpha": 1000.0}), lr=0.1)
        held.project_after(optimizer)
        return model, optimizer

    batches = tokens().view(4, 4, 8)
    model, optimizer = start()
    first = steps(model, optimizer, batches[:2])
    ll.save_all(model, folder / "saved")
    dist.barrier()
    expected = steps(model, optimizer, batches[2:])
    model, optimizer = start()
    ll.restore_all(model, folder / "saved")
    resumed = steps(model, optimizer, batches[2:])
    strengths = ll.adapters(model)["held"].state_dict()
    alphas = [value for name, t in strengths.items() if "alpha" in name for value in t.tolist()]
    record = {"first": first, "expected": expected, "resumed": resumed, "alphas": alphas}
    (folder / f"record{rank}.json").write_text(json.dumps(record))


def with_accelerate(folder: Path) -> None:
    """FSDP2 by accelerate's plugin, and its own checkpoints of an adapter and of a plain model."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from lora_lite_transformers import register

    rank = dist.get_rank()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )

    def start() -> tuple[Any, Any, Any]:
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        register(accelerator)
        model = tiny()
        ll.attach(model, "dora", r=2, targets=r"q_proj$")
        optimizer = torch.optim.AdamW(ll.param_groups(model, 0.1), lr=1e-2)
        return accelerator, *accelerator.prepare(model, optimizer)

    batches = tokens().view(4, 4, 8)
    accelerator, *run = start()
    first = steps(*run, batches[:2], accelerator.backward)
    accelerator.save_state(str(folder / "saved"))
    expected = steps(*run, batches[2:], accelerator.backward)
    accelerator, *run = start()
    accelerator.load_state(str(folder / "saved"))
    resumed = steps(*run, batches[2:], accelerator.backward)
    record = {"first": first, "expected": expected, "resumed": resumed}
    (folder / f"record{rank}.json").write_text(json.dumps(record))


def let_accelerate_shard_on_cpus() -> None:
    """accelerate takes FSDP on accelerators alone, though nothing in it asks for one."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def main() -> None:
    """torchrun ... trainers_worker.py FOLDER MODE: one run of one mode."""
    torch.set_num_threads(1)
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "hand":
        dist.init_process_group("gloo")
        by_hand(folder)
    elif mode == "accelerate":
        dist.init_process_group("gloo")
        let_accelerate_shard_on_cpus()
        with_accelerate(folder)
    else:
        if mode.endswith("fsdp"):
            let_accelerate_shard_on_cpus()
        with_trainer(folder, mode)
    leave()


if __name__ == "__main__":
    main()
