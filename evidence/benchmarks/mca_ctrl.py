"""What MCA-Ctrl costs, as ratios to plain sampling of three images in a batch, taken in one run.

    python dev.py benchmark mca_ctrl
        the demo model and the full-size SD1.5 structure, and one layer's memory
    python dev.py benchmark mca_ctrl --models sd15 --size 64 --steps 10
        512x512 pixels; in fp16 where there is a GPU

The subject and what is edited take half a picture each.
"""

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_extras.nodes_custom_sampler import BasicScheduler

from ...kernels import grid_masks
from ...nodes.mca_ctrl import CollaborativeAttention
from ...nodes.record import InvertImage
from ...patching.terms import AttentionTerm, pack
from . import bench

NEVER, ALWAYS = (1.0, 1.0), (0.0, 1.0)
HEADS, WIDTH = 8, 320  # of the largest layer of SD1.5


def left_and_right(size):
    """(subject mask, edit mask), [8 size, 8 size]."""
    left = torch.zeros(8 * size, 8 * size)
    left[:, : 4 * size] = 1
    return left, 1 - left


def inverted(on, count=2):
    sigmas = BasicScheduler.execute(on.model, "normal", on.steps, 1.0).args[0]
    return [
        InvertImage.execute(on.model, {"samples": torch.randn(1, 4, on.size, on.size)}, sigmas, on.negative).args[0]
        for _ in range(count)
    ]


def collaborating(on, histories, preset, **prompts):
    """(MODEL, LATENT) of a swap. preset: a name, or the windows (start, end) of SAGI and SALQ."""
    (subject, condition), (subject_mask, edit_mask) = histories, left_and_right(on.size)
    if not isinstance(preset, str):
        sagi, salq = preset
        preset = {
            "preset": "custom",
            "sagi_start": sagi[0],
            "sagi_end": sagi[1],
            "sagi_sites": "all",
            "salq_start": salq[0],
            "salq_end": salq[1],
            "salq_sites": "u2-",
        }
    else:
        preset = {"preset": preset}
    return CollaborativeAttention.execute(
        on.model,
        subject,
        subject_mask,
        preset,
        5,
        True,
        False,
        "SAGI first",
        0.3,
        "soft",
        condition,
        edit_mask,
        **prompts,
    ).args


def cases(on):
    """What is measured, by name."""
    histories, own = (
        inverted(on),
        {
            "subject_positive": on.positive,
            "condition_positive": on.positive,
            "negative": on.negative,
        },
    )
    three = {"samples": on.empty["samples"].expand(3, -1, -1, -1)}
    found = {"plain": on.plain, "plain, batch of 3": lambda: on.sample(on.model, three)}
    for name, windows in (("SAGI", (ALWAYS, NEVER)), ("SALQ", (NEVER, ALWAYS))):
        for suffix, prompts in (("", {}), (", own prompts", own)):
            patched = collaborating(on, histories, windows, **prompts)
            found[name + suffix] = lambda patched=patched: on.sample(*patched)
    return found


def count(name="demo", steps=50):
    """Rows that the UNet evaluates for an edited picture of 50 steps, its two inversions included; the released code:
    500.
    """
    on = bench.Bench(name, size=8, steps=steps)
    histories = []
    inversions = on.rows(lambda: histories.extend(inverted(on)))
    print(
        f"\nUNet evaluations for one edited picture, {steps} steps with CFG (released code: {10 * steps}); two"
        f" inversions: {inversions}"
    )
    own = {"subject_positive": on.positive, "condition_positive": on.positive, "negative": on.negative}
    for preset in ("notebook edit", "paper swap"):
        for suffix, prompts in (("", {}), (", own prompts", own)):
            patched = collaborating(on, histories, preset, **prompts)
            print(f"  {preset + suffix:<28} {inversions + on.rows(lambda patched=patched: on.sample(*patched))}")


# ---------------------------------------------------------------- one layer


def gathered(n, inside, subject):
    """Our SALQ at one layer, in both CFG halves. n: of the target, the subject and the condition, [3, tokens,
    channels].
    """
    front, back = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    rows = n[:, None, None].expand(-1, 2, -1, -1, -1)  # of both halves
    target, of_subject, condition = rows
    keys = of_subject[:, :, subject], condition[:, :, back]
    terms = [
        AttentionTerm(target[:, :, front], keys[0], keys[0], front),
        AttentionTerm(target[:, :, back], keys[1], keys[1], back),
    ]
    q, k, v, split = pack(terms, 1, n.shape[1])
    return split.attend(q, k, v, lambda *part: optimized_attention(*part[:3], HEADS))


def explicit(n, inside, subject):
    """The released code's way: a softmax over the full, masked map, for each of subject and condition."""
    results = []
    for source, allowed in ((1, subject), (2, ~inside)):
        q, k = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in (n[:1].expand(2, -1, -1), n[source : source + 1].expand(2, -1, -1))
        )
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + torch.where(allowed, 0.0, torch.finfo(n.dtype).min)
        results.append((logits.softmax(-1) @ k).transpose(1, 2).flatten(2))
    return torch.where(inside[:, None], *results)


def measure_layer(size=64):
    """Peak memory of a layer, which is what a larger picture runs out of."""
    n = torch.randn(3, size * size, WIDTH)
    if bench.CUDA:
        n = n.half().cuda()
    subject, inside = (grid_masks.cells(mask > 0, (size, size)).flatten().to(n.device) for mask in left_and_right(size))
    difference = (gathered(n, inside, subject) - explicit(n, inside, subject)).abs().max()
    peaks = {
        function.__name__: bench.peak(lambda function=function: function(n, inside, subject))
        for function in (gathered, explicit)
    }
    print(
        f"\none SALQ layer at {size}x{size} tokens, {HEADS} heads, {WIDTH} channels, both CFG halves (greatest"
        f" difference {difference:.1e}):"
    )
    for name, memory in peaks.items():
        print(f"  {name:<28} " + ("not known here" if memory is None else f"peak {memory:.0f} MB"))


if __name__ == "__main__":
    options = bench.arguments(__doc__).parse_args()
    with torch.inference_mode():
        measure_layer()
        count()
        for each in bench.benches(options):
            each.report(cases(each), options.repeats, plain="plain, batch of 3")
