"""The personalised subject: a look without words, taught from a few photos, once as the embedding of a new
word (textual inversion) and once as a LoRA of the attention, of the UNet and of the transformer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import diffusion, dit, scenes
from .scenes import photos
from .training_loop import Budget
from .vocabulary import UNKNOWN, tokenise

VECTORS = 2  # of the learned word
RANK = 4  # of the LoRA
BATCH = 8
LORA_WORD = "sks"  # no caption uses it: its embedding is every unknown word's


def captions(drawn: scenes.Scenes, name: str) -> list[str]:
    return [scenes.caption(drawn, i, name=name) for i in range(len(drawn.radius))]


def projections(network: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a UNet or a transformer that make queries, keys and values, and those that read what was attended
    to; a transformer's single blocks have one each for these and the MLP.
    """
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, diffusion.Attention):
            parts = ("to_q", "to_k", "to_v", "to_out.0")
        elif isinstance(module, dit.SelfAttention):
            parts = ("qkv", "proj")
        elif isinstance(module, dit.SingleBlock):
            parts = ("linear1", "linear2")
        else:
            parts = ()
        found |= {f"{name}.{part}": module.get_submodule(part) for part in parts}
    return found


class LoRA:
    """Low-rank additions to every attention projection of a network, in effect until `remove`."""

    def __init__(self, network: nn.Module, generator: torch.Generator):
        self.factors: dict[str, Tensor] = {}
        self.hooks = []
        for name, layer in projections(network).items():
            self._add(name, layer, generator)

    def state(self) -> dict[str, Tensor]:
        """As ComfyUI's loader reads it, in half precision."""
        state = {f"diffusion_model.{key}": value.half() for key, value in self.factors.items()}
        alphas = [key.replace("lora_up.weight", "alpha") for key in state if "lora_up" in key]
        return state | {key: torch.tensor(float(RANK)) for key in alphas}

    def _add(self, name: str, layer: nn.Linear, generator) -> None:
        device = layer.weight.device
        down = torch.randn(RANK, layer.in_features, generator=generator).to(device) / layer.in_features**0.5
        up = torch.zeros(layer.out_features, RANK, device=device)
        self.factors |= {
            f"{name}.lora_down.weight": down.requires_grad_(),
            f"{name}.lora_up.weight": up.requires_grad_(),
        }
        self.hooks.append(layer.register_forward_hook(lambda _, inputs, out: out + inputs[0] @ down.T @ up.T))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def train(trainer, budget: Budget) -> None:
    """Trains embedding, then LoRA, each with half the budget, and writes both as ComfyUI loads them."""
    drawn, pictures = photos(trainer.args.size)
    with torch.no_grad():
        latents = trainer.auto.encode(pictures.to(trainer.device))
    half = Budget(budget.seconds / 2, budget.steps)
    trainer.unet.requires_grad_(False)
    trainer.text.requires_grad_(False)
    _embedding(trainer, drawn, latents, half)
    _lora(trainer, drawn, latents, half)


def _embedding(trainer, drawn, latents, budget) -> None:
    table = trainer.text.text_model.embeddings["token_embedding"]
    word = table.weight[-1].detach().repeat(VECTORS, 1).requires_grad_()
    ids = tokenise(captions(drawn, " ".join(["?"] * VECTORS))).to(trainer.device)

    def loss_of(generator):
        rows = torch.randint(len(latents), (BATCH,), generator=generator, device=trainer.device)

        def context():
            embedded = table(ids[rows])
            embedded[ids[rows] == UNKNOWN] = word.repeat(len(rows), 1).to(embedded.dtype)
            return trainer.text.encode(embedded)

        return trainer.denoising_loss(latents[rows], context, generator)

    trainer.fit("embedding", {"word": word}, loss_of, budget, lr=2e-2, warmup=10)
    trainer.save({"clip_l": word}, "demo-subject-embedding", "embedding")


def _lora(trainer, drawn, latents, budget) -> None:
    lora = LoRA(trainer.unet, torch.Generator().manual_seed(trainer.args.seed))
    batch = _batches(trainer, drawn, latents)

    def loss_of(generator):
        x, words = batch(generator)
        return trainer.denoising_loss(x, lambda: trainer.text(words), generator)

    trainer.fit("lora", lora.factors, loss_of, budget, lr=6e-3, warmup=10)
    lora.remove()
    trainer.save(lora.state(), "demo-subject-lora", "lora")


def train_dit(trainer, budget: Budget) -> None:
    """Trains the transformer's LoRA and writes it as ComfyUI loads it."""
    drawn, pictures = photos(trainer.args.size)
    with torch.no_grad():
        latents = trainer.auto.encode(pictures.to(trainer.device))
    trainer.dit.requires_grad_(False)
    lora = LoRA(trainer.dit, torch.Generator().manual_seed(trainer.args.seed))
    batch = _batches(trainer, drawn, latents)

    def loss_of(generator):
        x, words = batch(generator)
        return trainer.flow(trainer.dit, x, words, generator)[0]

    trainer.fit("dit_lora", lora.factors, loss_of, budget, lr=6e-3, warmup=10)
    lora.remove()
    trainer.save(lora.state(), "demo-dit-subject-lora", "dit_lora")


def _batches(trainer, drawn, latents) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """What draws (latents, tokens): half of every batch is the subject, half is the world as it was, which the LoRA
    should leave alone. drawn, latents: of the photos.
    """
    known, tokens = trainer.latents()
    ids = tokenise(captions(drawn, LORA_WORD)).to(trainer.device)

    def batch(generator):
        rows = torch.randint(len(latents), (BATCH // 2,), generator=generator, device=trainer.device)
        others = torch.randint(len(known), (BATCH // 2,), generator=generator, device=trainer.device)
        x = torch.cat([latents[rows], known[others].float()])
        # Alternating, because the loss spreads its times over the batch in order.
        mix = torch.arange(BATCH, device=trainer.device).view(2, -1).T.flatten()
        words = torch.cat([ids[rows], tokens[others, 0].long()])
        return x[mix], words[mix]

    return batch
