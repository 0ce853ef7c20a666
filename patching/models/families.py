"""Which family a MODEL belongs to."""

from comfy.model_patcher import ModelPatcher

from .. import internals
from .base import ModelFamily, Site
from .dit import ARCHITECTURES, DiT
from .unet import UNet

FAMILIES: tuple[type[ModelFamily], ...] = (UNet, DiT)
WORKING = ", ".join(["SD1.x, SD2.x, SDXL", *dict.fromkeys(known.name for known in ARCHITECTURES.values())])
# transformers into whose attention ComfyUI lets nobody see, by their class
CLOSED = {"ErnieImageModel": "ERNIE-Image", "HunYuanDiT": "HunyuanDiT", "PixArtMS": "PixArt"}


def family_of(model: ModelPatcher) -> ModelFamily:
    """The family of a MODEL. Raises ValueError for a kind of diffusion model that nobody has listed."""
    network = internals.network_of(model)
    for family in FAMILIES:
        if family.owns(network):
            return family(model, network)
    kind = type(network).__name__
    what = f"this MODEL is {CLOSED[kind]}" if kind in CLOSED else f"this MODEL is a {type(model.model).__name__}"
    why = ", whose attention ComfyUI does not let nodes reach" if kind in CLOSED else f" with a {kind}"
    raise ValueError(f"Montage supports {WORKING}; {what}{why}. Load one of these models.")


def require_unet(node: str, model: ModelPatcher, why: str) -> None:
    """Refuse a MODEL that is no UNet, for a node that needs one. node: its display name. why: what it uses."""
    if not family_of(model).is_unet:
        raise ValueError(
            f"{node}: it works on SD1.x, SD2.x and SDXL only: {why}. This MODEL is a {type(model.model).__name__};"
            " disconnect the node from it."
        )


def sites_of(model: ModelPatcher) -> tuple[Site, ...]:
    """Every attention site of the MODEL, in the order of execution (16 for SD1.5, 70 for SDXL)."""
    return family_of(model).sites()


def parse_sites(node: str, model: ModelPatcher, text: str, name: str = "sites") -> tuple[Site, ...]:
    """The sites of the MODEL that an input of a node names. node: its display name, name: the input's, for messages."""
    where = node
    try:
        family = family_of(model)
        where = f"{node}: {name}"
        return family.parse_sites(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
