"""Which family a MODEL belongs to."""

from comfy.model_patcher import ModelPatcher

from .. import internals
from .base import ModelFamily, Site
from .unet import UNet

FAMILIES: tuple[type[ModelFamily], ...] = (UNet,)


def family_of(model: ModelPatcher) -> ModelFamily:
    """The family of a MODEL. Raises ValueError for a kind of diffusion model that nobody has listed."""
    network = internals.network_of(model)
    for family in FAMILIES:
        if family.owns(network):
            return family(model, network)
    raise ValueError(
        "Montage works inside the attention of SD1.x, SD2.x and SDXL UNets; this MODEL is a"
        f" {type(model.model).__name__} with a {type(network).__name__}. Load an SD1.x, SD2.x or SDXL checkpoint."
    )


def sites_of(model: ModelPatcher) -> tuple[Site, ...]:
    """Every attention site of the MODEL, in the order of execution (16 for SD1.5, 70 for SDXL)."""
    return family_of(model).sites()


def parse_sites(node: str, model: ModelPatcher, text: str, name: str = "sites") -> tuple[Site, ...]:
    """The sites of the MODEL that an input of a node names. node: its display name, name: the input's, for messages."""
    try:
        return family_of(model).parse_sites(text)
    except ValueError as error:
        raise ValueError(f"{node}: {name}: {error}") from None
