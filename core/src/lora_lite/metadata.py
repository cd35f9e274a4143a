"""What an adapter's file says of itself, validated: nothing of it is trusted before.

`Metadata` is today's format, `FirstMetadata` that of version 0.1.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_lite.fingerprint import BYTES_PER_SAMPLE, MOST_PER_SITE, PROBES

ZEROS = "0" * 64

Path = Annotated[str, Field(max_length=4096)]
Samples = Annotated[
    bytes, Field(min_length=BYTES_PER_SAMPLE, max_length=BYTES_PER_SAMPLE * MOST_PER_SITE)
]
Probes = Annotated[list[float], Field(min_length=PROBES, max_length=PROBES)]


class Record(BaseModel):
    """A part of the metadata: strict, and without unknown fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        ser_json_inf_nan="constants",
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )


class Configuration(Record):
    """A variant with its fields, as some layers of the adapter have it.

    Attributes:
        variant: its name.
        variant_format: the `Variant.format` that fields and tensors follow.
        provider: the distribution that it comes from, and its version.
        fields: as JSON.
    """

    variant: Annotated[str, Field(min_length=1, max_length=200)]
    variant_format: int
    provider: str
    fields: str


class Metadata(Record):
    """What a file says of itself.

    Attributes:
        digest: of the whole file, made with zeros in its own place.
        format: of the file.
        core: the version of lora-lite-core that wrote it.
        configurations: the variants of the adapter.
        sites: for the path of each layer, the index of its configuration.
        seed: of the adapter.
        scale: of the adapter.
        dtypes: of the tensors in the file, as `dtypes_of` gives them.
        derived: whether derived tensors are in the file; if they are not, `probes` verify them.
        uses_base: whether tensors were computed from the base's weights.
        fingerprint: samples of the base's weights by layer.
        probes: of the derived tensors that are not in the file.
    """

    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = ZEROS
    format: Literal[2] = 2
    core: str
    configurations: Annotated[list[Configuration], Field(min_length=1)]
    sites: Annotated[dict[Path, int], Field(min_length=1)]
    seed: int
    scale: Annotated[float, Field(allow_inf_nan=False)]
    dtypes: list[str]
    derived: bool
    uses_base: bool
    fingerprint: dict[Path, Samples]
    probes: dict[Path, Probes]

    def of(self, path: str) -> Configuration:
        """The configuration of one layer."""
        return self.configurations[self.sites[path]]


class FirstMetadata(Record):
    """The metadata of format 1: one variant for all layers, and no digest."""

    format: Literal[1]
    variant: str
    variant_format: int
    provider: str
    core: str
    sites: Annotated[dict[Path, str], Field(min_length=1)]
    seed: int
    scale: Annotated[float, Field(allow_inf_nan=False)]
    dtypes: list[str]
    derived: bool
    uses_base: bool
    fingerprint: dict[Path, Samples]
    probes: dict[Path, Probes]

    def upgraded(self) -> Metadata:
        """The same in today's format."""
        texts = list(dict.fromkeys(self.sites.values()))
        same = self.model_dump(exclude={"format", "variant", "variant_format", "provider", "sites"})
        return Metadata(
            configurations=[
                Configuration(
                    variant=self.variant,
                    variant_format=self.variant_format,
                    provider=self.provider,
                    fields=text,
                )
                for text in texts
            ],
            sites={path: texts.index(text) for path, text in self.sites.items()},
            **same,
        )
