"""What Layout-and-Retouch costs, as ratios to plain sampling taken in one run.

python dev.py benchmark layout_retouch
    the demo model and the full-size SD1.5 structure
python dev.py benchmark layout_retouch --models sd15 --size 64 --steps 50
    512x512 pixels; in fp16 where there is a GPU
"""

import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler, CFGGuider

from ...nodes.layout_retouch import AdaptiveMaskBlend, MultiSourceSwap, StepBlendSampler, TokenAttentionMap
from ...nodes.record import InvertImage
from ...workshop.sampling import recorder, sample_custom
from . import bench

PROMPT = "a red ball on grass"


def blended(on, personal, latent, switch=0.1, ramp=0.0):
    """Stage one."""
    guiders = [CFGGuider.execute(model, on.positive, on.negative, 3.0).args[0] for model in (on.model, personal)]
    return sample_custom(latent, StepBlendSampler.execute(*guiders, switch, ramp).args[0], sigmas(on))[0]


def sigmas(on):
    return BasicScheduler.execute(on.model, "normal", on.steps, 1.0).args[0]


def reference(on):
    picture = {"samples": torch.randn(1, 4, on.size, on.size, generator=torch.Generator().manual_seed(3))}
    return InvertImage.execute(on.model, picture, sigmas(on), on.negative).args[0]


def measured(on, model, latent):
    """Token Attention Map."""
    model, latent, positive = TokenAttentionMap.execute(model, latent, on.clip, PROMPT, "ball", "d@2-4,u@2-4").args
    return model, latent, on.with_features(positive)


def cases(on):
    """What is measured, by name."""
    personal = on.model.clone()  # as with an embedding: a LoRA is patched in at the switch, which is no cost of a step
    layout, subject = blended(on, *recorder(personal, on.empty, 0)), reference(on)
    mask = torch.zeros(1, on.size, on.size)
    mask[:, on.size // 4 : -on.size // 4, on.size // 4 : -on.size // 4] = 1
    running = AdaptiveMaskBlend.execute(0.3, 0.01, "or").args[1]

    def retouched(**optional):
        return lambda: on.sample(
            *MultiSourceSwap.execute(on.model, layout, subject, 0.2, 0.6, 1.0, "u@1-2", **optional).args
        )

    def whole():
        laid = blended(on, *recorder(personal, on.empty, 0))
        on.sample(*MultiSourceSwap.execute(on.model, laid, reference(on), 0.2, 0.6, 1.0, "u@1-2", mask=mask).args)

    swap = MultiSourceSwap.execute(on.model, layout, subject, 0.2, 0.6, 1.0, "u@1-2", running_mask=running).args
    return {
        "plain": on.plain,
        "token map": lambda: on.sample(*measured(on, on.model, on.empty)),
        "step blend": lambda: blended(on, personal, on.empty),
        "step blend, ramp of half": lambda: blended(on, personal, on.empty, 0.25, 0.5),
        "inversion": lambda: reference(on),
        "retouch, no mask": retouched(),
        "retouch": retouched(mask=mask),
        "retouch, reference prompt": retouched(mask=mask, reference_prompt=on.positive),
        "retouch, running mask": lambda: on.sample(*measured(on, *swap)),
        "both stages, inversion": whole,
    }


if __name__ == "__main__":
    options = bench.arguments(__doc__).parse_args()
    with torch.inference_mode():
        for on in bench.benches(options):
            on.report(cases(on), options.repeats)
