"""An adapter in the parts that a folder of PEFT has places for.

layers with an adapter        linear layers, embeddings, the experts of a mixture
what is trained beside them   full, tokens: see `write_beside`
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lora_lite import Adapter, AdapterError
from lora_lite.author import Variant
from lora_lite.change import LayerChange, changes_at
from lora_lite.experts import ExpertStack
from lora_lite.low_rank import LowRank, low_rank
from torch import Tensor

BESIDE = ("full", "tokens")


@dataclass(frozen=True)
class Part:
    """Some layers of an adapter.

    Attributes:
        adapter: the whole.
        sites: the variant of each layer.
    """

    adapter: Adapter
    sites: Mapping[str, Variant]

    @property
    def name(self) -> str:
        """Of the adapter."""
        return self.adapter.name

    @property
    def scale(self) -> float:
        """Of the adapter."""
        return self.adapter.scale

    @property
    def names(self) -> set[str]:
        """Of the variants."""
        return {variant.name for variant in self.sites.values()}

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the whole adapter."""
        return self.adapter.state_dict()

    def low_rank(self, rank: int | None) -> dict[str, LowRank]:
        """The factors of each layer, or of each expert at `path[e]`."""
        return low_rank(self._changes(), rank)

    def _changes(self) -> Iterator[LayerChange]:
        for path in self.sites:
            attachment = self.adapter._state.attachments[path]
            yield from changes_at(attachment, self.adapter._modules[path])

    def experts(self, path: str) -> ExpertStack | None:
        """How the experts of a layer lie; None for other layers."""
        kind = self.adapter._state.attachments[path].layer.kind
        return kind if isinstance(kind, ExpertStack) else None

    def reads_ids(self, path: str) -> bool:
        """Whether a layer is an embedding."""
        return self.adapter._state.attachments[path].layer.kind.reads_ids

    def is_linear(self, path: str) -> bool:
        """Whether a layer is an ordinary linear one."""
        return self.adapter._state.attachments[path].layer.kind.default


def parts_of(adapter: Adapter) -> tuple[Part, Part]:
    """The layers with an adapter, and what is trained beside them.

    Raises:
        AdapterError: PEFT has no place for some of them, or they are nothing but the latter.
    """
    beside = {path: v for path, v in adapter.sites.items() if v.name in BESIDE}
    layers = Part(adapter, {path: v for path, v in adapter.sites.items() if path not in beside})
    others = [
        path
        for path in layers.sites
        if not (layers.is_linear(path) or layers.reads_ids(path) or layers.experts(path))
    ]
    if others:
        raise AdapterError(
            f"a folder of PEFT has a place for linear layers, embeddings and experts, and adapter "
            f"{adapter.name!r} is also on",
            details=others,
            fix="format='merged' takes them all; adapter.save(path) keeps them as they are",
            adapter=adapter.name,
            layer=others[0],
        )
    if not layers.sites:
        raise AdapterError(
            f"adapter {adapter.name!r} trains layers' own parameters and nothing else",
            expected="A folder of PEFT has them beside an adapter, such as a LoRA",
            fix="format='merged' writes the whole model; adapter.save(path) keeps the adapter",
            adapter=adapter.name,
        )
    return layers, Part(adapter, beside)
