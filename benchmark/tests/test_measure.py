"""Times and costs: that they are of what they say."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import Accelerator
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.costs import against_base, alone
from lora_lite_benchmark.data import Example, collate
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.measure import TimedPass
from lora_lite_benchmark.models import load_model
from lora_lite_benchmark.variants import attach_adapter
from lora_lite_benchmark.verify import check_macs

Make = Callable[..., RunConfig]


def test_the_pass_is_timed_from_the_first_item_to_the_end() -> None:
    """What happens before the first item is asked for and after the last one was used up is not
    counted; what the reader does with the items, and what it takes to make them, is.
    """

    def items() -> Iterator[int]:
        for item in range(3):
            time.sleep(0.02)
            yield item

    timed = TimedPass(items(), torch.device("cpu"))
    assert timed.seconds is None
    time.sleep(0.2)
    for _ in timed:
        time.sleep(0.02)
    time.sleep(0.2)
    assert timed.seconds is not None
    assert 0.12 <= timed.seconds < 0.3


@pytest.mark.parametrize(
    "row",
    ["lora:r=4", "dora:r=4", "hra:r=4", "antipasto:r=8", "ia3", "norms", "head", "full", "base"],
)
def test_declared_macs_are_the_counted_ones(
    make_config: Make, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a whole model what FlopCounterMode sees is what a variant declares; one MAC more or less
    is an error with both.
    """
    config = make_config(row, targets=None, lr=0.01)
    model = load_model(config)
    adapter = attach_adapter(model, config, [])
    batch = collate([Example([5, 6, 7, 1], 2), Example([8, 1], 1)], pad=0)
    counted = check_macs(model, adapter, batch)
    assert counted == (adapter.macs_per_token, adapter.macs_per_forward)
    monkeypatch.setattr(type(adapter), "macs_per_token", counted.per_token + 1)
    with pytest.raises(BenchmarkError, match=r"adds .* MACs for each token .* It declares"):
        check_macs(model, adapter, batch)


def test_costs_are_ratios_to_the_base_in_training_and_in_answering(make_config: Make) -> None:
    """What is slow only in training raises the step's ratio alone, what is slow always both; the
    quartiles enclose the median, and the base is left as it was.
    """
    config = make_config("lora:r=2", targets=None)
    model, base = load_model(config), load_model(config)
    adapter = attach_adapter(model, config, [])
    batch = collate([Example([5, 6, 7, 1], 2), Example([8, 1], 1)], pad=0)
    slow_in_training = model.register_forward_pre_hook(
        lambda *_: time.sleep(0.05) if torch.is_grad_enabled() else None
    )
    costs = against_base(model, adapter.frozen, base, batch, Accelerator(cpu=True))
    assert costs.inference_ratio is not None
    assert costs.step_ratio is not None
    for ratio in (costs.inference_ratio, costs.step_ratio):
        assert ratio.low <= ratio.median <= ratio.high
    assert costs.step_ratio.median > 2 * costs.inference_ratio.median
    slow_in_training.remove()

    model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    slower = against_base(model, adapter.frozen, base, batch, Accelerator(cpu=True))
    assert slower.inference_ratio is not None
    assert slower.inference_ratio.median > 2 * costs.inference_ratio.median
    assert all(parameter.grad is None for parameter in [*model.parameters(), *base.parameters()])
    assert not any(module._forward_hooks for module in base.modules())
    assert alone(base, batch, Accelerator(cpu=True)).inference_ratio is None
