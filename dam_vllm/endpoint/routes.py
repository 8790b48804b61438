"""Routes under `/dam`, read-only."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer

from dam_vllm.endpoint import answers, models
from dam_vllm.endpoint.counts import Live
from dam_vllm.endpoint.page import page
from dam_vllm.masks.mask_set import MaskSet

PATIENCE = 10.0
PNG = "image/png"


@dataclass(frozen=True)
class Open:
    """What the routes of a server tell of.

    Attributes:
        served: what is served.
        masks: the masks.
        live: counts of the engines.
    """

    served: models.Served
    masks: MaskSet
    live: Live
    _images: dict[int, np.ndarray] = field(default_factory=dict)

    def image(self, layer: int, head: int) -> np.ndarray:
        """Of `answers.images`, made once a layer."""
        if layer not in self._images:
            self._images[layer] = answers.images(self.masks, layer)
        return np.asarray(self._images[layer][head])


def routers(has_key: Callable[[Any], bool] | None) -> list[APIRouter]:
    """The routes.

    Args:
        has_key: tells by a request's headers whether it has a key of the server's; None where none
            is asked for. The viewer's page holds no data and is given without one.
    """

    def authorised(request: Request) -> None:
        if has_key is not None and not has_key(request.headers):
            raise HTTPException(401, "Unauthorized")

    guards = [Depends(authorised), Depends(HTTPBearer(auto_error=False))]
    data = APIRouter(prefix="/dam", tags=["dam"], dependencies=guards)
    data.get("")(get_served)
    data.get("/density")(get_density)
    data.get("/masks/{layer}/{head}", responses={200: {"content": {PNG: {}}}})(get_mask)
    viewer = APIRouter(prefix="/dam", tags=["dam"])
    viewer.get("/view", response_class=HTMLResponse)(get_view)
    return [data, viewer]


def opened(request: Request) -> Open:
    """What there is to tell of; 404 where nothing is."""
    found = getattr(request.app.state, "dam", None)
    if not isinstance(found, Open):
        raise HTTPException(404, "this server runs without --attention-backend dam")
    return found


Opened = Annotated[Open, Depends(opened)]


def get_served(dam: Opened) -> models.Served:
    """What the server serves with: masks, options, modes of all heads."""
    return dam.served


async def get_density(dam: Opened) -> models.Density:
    """Pages read since the server began, of each layer and KV head."""
    return answers.density(await dam.live.counts(PATIENCE))


def get_mask(
    request: Request,
    dam: Opened,
    layer: int,
    head: int,
    format: Literal["json", "png"] | None = None,  # noqa: A002 (the query's name)
) -> models.HeadMask:
    """The mask of a KV head; an image with `Accept: image/png` or `?format=png`."""
    types, kv_heads = dam.masks.header.layer_types, dam.masks.kv_heads
    if not 0 <= layer < len(types):
        raise HTTPException(404, f"layer is {layer}: must be 0 to {len(types) - 1}")
    if not 0 <= head < kv_heads:
        raise HTTPException(404, f"head is {head}: must be a KV head, 0 to {kv_heads - 1}")
    if types[layer] != "full":
        raise HTTPException(404, f"layer {layer} has no masks: it is left to vLLM ({types[layer]})")
    image = dam.image(layer, head)
    accepts_png = PNG in request.headers.get("accept", "")
    if format == "png" or (format is None and accepts_png):
        from dam_vllm.masks.plots import picture

        title = f"layer {layer}, KV head {head} ({dam.served.layers[layer].heads[head].mode})"
        png = picture(image, dam.masks, title)
        return Response(png, media_type=PNG)  # type: ignore[return-value]
    return answers.head_mask(dam.masks, layer, head, image)


def get_view() -> str:
    """The viewer."""
    return page()
