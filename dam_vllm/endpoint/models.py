"""What the endpoint answers with."""

from typing import Any

from pydantic import BaseModel, Field


class Budget(BaseModel):
    """How many pages a dynamic head chooses beyond its static ones."""

    kind: str = Field(description="top_k (tokens), share (of the context) or top_p (of the mass)")
    value: float
    floor: int = Field(description="fewest tokens")
    cap: int = Field(description="most tokens")
    words: str = Field(description="the same in words")
    channels: int = Field(description="channels in which keys are scored")


class Head(BaseModel):
    """A KV head or the heads of a layer that vLLM serves itself."""

    mode: str = Field(description="static, dynamic, reuse or dense")
    anchor: tuple[int, int] | None = Field(
        description="layer and KV head whose chosen pages a reusing head reads"
    )
    budget: Budget | None = Field(description="of a dynamic head, or of a reusing head's anchor")
    tail: bool = Field(description="whether means of spans stand for what it does not read")


class Layer(BaseModel):
    """One layer of the model."""

    layer: int
    type: str = Field(description='"full" has masks; "sliding" and "other" are left to vLLM')
    heads: list[Head] = Field(description="KV heads; none where the layer is left to vLLM")


class Served(BaseModel):
    """What a server serves with. Files are told by name, without folders."""

    masks: str = Field(description="the mask file")
    kind: str = Field(description="how the masks were made")
    model: str = Field(description="the model that they were made for")
    fingerprint: dict[str, str | None]
    pcl: int = Field(description="Pattern Capture Length, tokens")
    parameters: dict[str, Any] = Field(description="what made the masks")
    options: dict[str, Any] = Field(description='options under "dam"')
    page: int = Field(description="tokens a page")
    dense_until: int = Field(description="positions below it read everything, tokens")
    layers: list[Layer]
    versions: dict[str, str]


class Pages(BaseModel):
    """Pages times queries since the server began."""

    read: int
    dense: int = Field(description="what dense attention would have read")
    density: float | None = Field(description="read / dense; null where nothing was read yet")


class HeadPages(BaseModel):
    """Pages of one KV head."""

    layer: int
    head: int = Field(description="KV head")
    prefill: Pages
    decode: Pages


class Density(BaseModel):
    """What was read, of layers with masks."""

    age: float = Field(description="seconds since the engine told it")
    prefill: Pages
    decode: Pages
    heads: list[HeadPages]


class HeadMask(Head):
    """The mask of one KV head: what any of its query heads may attend."""

    layer: int
    head: int = Field(description="KV head")
    coverage: list[float | None] | None = Field(
        description="of each query head: attention mass that the true mask keeps"
    )
    coverage_extended: list[float | None] | None = Field(
        description="likewise at and beyond the PCL, under columns and diagonals"
    )
    columns: int = Field(description="kept columns")
    diagonals: int = Field(description="kept diagonals")
    pcl: int = Field(description="Pattern Capture Length, tokens")
    tokens: int = Field(description="tokens that a side of the image stands for")
    cells: int = Field(description="cells of a side of the image")
    image: str = Field(
        description="base64 of cells x cells bytes, query rows from the top: share of attended "
        "pairs in each cell, 255 for all"
    )
