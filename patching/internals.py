"""The seam to ComfyUI: the one file of this pack that reaches behind ComfyUI's public API for patching models."""

import contextlib
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context

ATTENTION = "optimized_attention_override"  # ComfyUI's name of the slot for a transformer's attention
# in transformer options: what a run or an evaluation has of its own
OF_ONE_CALL = {
    "sigmas",
    "sample_sigmas",
    "uuids",
    "cond_or_uncond",
    "wrappers",
    "callbacks",
    "patches",
    "patches_replace",
    "montage",
}
# in processed conditionings: what ties them to a batch of their own, and what must be the same to share one
ALONE = ("area", "mask", "control", "gligen", "hooks", "default")
WEIGHTED = ("strength", "timestep_start", "timestep_end")
KEY = "montage"  # of our wrappers and attachments in a MODEL, and of the Session in a run's transformer options


def room_for(model: ModelPatcher, shape: tuple[int, ...], wanted: int) -> bool:
    """Whether so many bytes may be held on a MODEL's device: no CPU, and besides what it takes to compute a batch."""
    management, device = comfy.model_management, model.load_device
    if management.is_device_cpu(device):
        return False
    network: Any = model.model
    computing = 1.5 * network.memory_required(list(shape)) + management.extra_reserved_memory()
    left = management.get_free_memory(device) - 1.1 * wanted
    return left > max(computing, management.minimum_inference_memory())


def pins_memory() -> bool:
    """Whether ComfyUI lets main memory be pinned for a GPU."""
    return comfy.model_management.MAX_PINNED_MEMORY > 0


def account_for(patcher: ModelPatcher) -> None:
    """Have ComfyUI count what a patcher holds on its device among the models that are loaded there, and ask it for that
    memory when it needs some (partially_unload, detach).
    """
    loaded = comfy.model_management.LoadedModel(patcher)
    loaded.real_model = weakref.ref(patcher.model)
    loaded.model_finalizer = weakref.finalize(patcher.model, comfy.model_management.cleanup_models)
    loaded.model_finalizer.atexit = False
    comfy.model_management.current_loaded_models.insert(0, loaded)


def node_at_work() -> tuple[str, str] | None:
    """(id of the prompt, id of the node) that ComfyUI executes now; None outside of a prompt."""
    context = get_executing_context()
    return context and (context.prompt_id, context.node_id)


# ---------------------------------------------------------------- a MODEL


def attached(model: ModelPatcher, default: Any) -> Any:
    """What this pack has attached to a MODEL."""
    found = model.get_attachment(KEY)
    return default if found is None else found


def loader_of(model: ModelPatcher) -> tuple[str, str] | None:
    """(identity, file name) of what loaded the MODEL's weights; None where ComfyUI does not know."""
    loader = model.cached_patcher_init
    if not loader:
        return None
    return repr((loader[0].__qualname__, loader[1])), str(loader[1][0]).replace("\\", "/").rpartition("/")[2]


def patches_id(model: ModelPatcher) -> Any:
    """Changes whenever weights are patched (LoRAs)."""
    return model.patches_uuid


def injected_adapters(model: ModelPatcher) -> dict[str, Any]:
    """What acts by injection instead of by patched weights, {name: adapters}: of Load LoRA Bypass each adapter and its
    strength, of an injection of another kind nothing but the name.
    """
    found: dict[str, Any] = {}
    for key, injections in model.injections.items():
        for number, injection in enumerate(injections):
            cells = getattr(injection.inject, "__closure__", None) or ()
            managers = [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "adapters")]
            found[f"{key} {number}"] = [manager.adapters for manager in managers]
    return found


def has_context_windows(model: ModelPatcher) -> bool:
    return model.model_options.get("context_handler") is not None


def is_split_over_devices(model: ModelPatcher) -> bool:
    return bool(model.get_additional_models_with_key("multigpu"))


def network_of(model: ModelPatcher) -> torch.nn.Module:
    """The diffusion model of a MODEL, also where torch.compile has wrapped it."""
    network = model.get_model_object("diffusion_model")
    return getattr(network, "_orig_mod", network)


def make_current(model: ModelPatcher) -> None:
    """Have the model's weights patched as this MODEL says: two MODELs may share their weights and differ in LoRAs."""
    model.model.current_patcher = model


def unpatched_weight(model: ModelPatcher, key: str) -> torch.Tensor:
    """A weight as its file has it, before LoRAs."""
    return model.get_key_patches(key)[key][0][0]


@contextlib.contextmanager
def copied_weights(module: torch.nn.Module) -> Iterator[list[Any]]:
    """Have every operation of a module compute with a copy of its weights. Yields those operations."""
    operations = [part for part in module.modules() if isinstance(part, comfy.ops.CastWeightBiasOp)]
    before = [(part.weight_function, part.bias_function) for part in operations]
    for part in operations:
        part.weight_function = [*part.weight_function, torch.clone]
        part.bias_function = [*part.bias_function, torch.clone]
    try:
        yield operations
    finally:
        for part, (weight_function, bias_function) in zip(operations, before):
            part.weight_function, part.bias_function = weight_function, bias_function


# ---------------------------------------------------------------- the options of a model evaluation


def cloned_options(options: dict) -> dict:
    return create_model_options_clone(options)


def recorded_options(options: dict) -> dict:
    """A copy of a run's model options, for its replays. Without what holds the MODELs that it was sampled with: its
    Session, and what is for loading alone.
    """
    options = create_model_options_clone(options)
    options.pop("to_load_options", None)
    transformer = options["transformer_options"]
    transformer.pop(KEY, None)
    transformer.get("wrappers", {}).pop(WrappersMP.PREPARE_SAMPLING, None)
    return options


def same_options(options: dict, recorded: dict) -> bool:
    """Whether model options compute what those of `recorded_options` do."""
    one, other = (_computing(each) for each in (options, recorded))
    return same_conditioning(one, other)


def _computing(options: dict) -> dict:
    """What of model options says how the model is computed, besides what every run has of its own."""
    transformer = options.get("transformer_options", {})
    wrappers = transformer.get("wrappers", {})
    return {
        "settings": _settings(options),
        "patches": {kind: transformer.get(kind, {}) for kind in ("patches", "patches_replace")},
        "wrappers": {kind: value for kind, value in wrappers.items() if kind != WrappersMP.PREPARE_SAMPLING},
        "function": options.get("model_function_wrapper"),
    }


def _settings(options: dict) -> dict:
    """The transformer options that are no one call's, and no patches."""
    return {key: value for key, value in options.get("transformer_options", {}).items() if key not in OF_ONE_CALL}


def without_compile(options: dict) -> tuple[dict, bool]:
    """(a copy of model options without torch.compile, whether it was there). A compiled model would run the graph that
    was traced without our patches.
    """
    options = create_model_options_clone(options)
    wrappers = options["transformer_options"].get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return options, bool(wrappers.pop("torch.compile", None))


def add_first(options: dict, kind: str, patch: Callable) -> None:
    """Put a patch before all others of its kind into (a copy of) model options."""
    patches = options["transformer_options"].setdefault("patches", {})
    patches[kind] = [patch, *patches.get(kind, ())]


def wrap_network(options: dict, wrapper: Callable) -> None:
    """Add an APPLY_MODEL wrapper to (a copy of) model options."""
    comfy.patcher_extension.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper, options, is_model_options=True)


def replace_attention(options: dict, override: Callable) -> Callable | None:
    """Put a function into the slot of (a copy of) model options that computes every attention of a transformer. Returns
    the one that stood there, which it is to go on calling.
    """
    transformer = options["transformer_options"]
    occupant = transformer.get(ATTENTION)
    transformer[ATTENTION] = override
    return occupant


def module_name(function: Callable) -> str:
    """The last part of the name of the module that a function comes from: by it other nodes' functions can be told."""
    module = str(getattr(function, "__module__", None) or type(function).__module__)  # an object that can be called
    return module.replace("\\", "/").replace(".", "/").rpartition("/")[2]


def wrapper_keys(options: dict) -> Iterator[str]:
    """The keys of all wrappers in model options: the names by which other nodes can be told."""
    for wrappers in options.get("transformer_options", {}).get("wrappers", {}).values():
        yield from (str(key) for key in wrappers if key is not None)


def others_wrap_evaluations(options: dict) -> bool:
    """Whether another node may evaluate the model at other sigmas than a sampler asks for."""
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    kinds = WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE
    found = (key for kind in kinds for key, group in wrappers.get(kind, {}).items() if group)
    return not all(str(key).startswith(KEY) for key in found)


def is_patched_by_others(options: dict) -> bool:
    """Whether anything but this pack changes what the model computes, and might do so row by row."""
    return _is_patched(options) or ATTENTION in options.get("transformer_options", {})


def _is_patched(options: dict) -> bool:
    """The same, but for a function that computes all attentions."""
    transformer = options.get("transformer_options", {})
    others = {key for key in wrapper_keys(options) if key != KEY}
    patched = any(transformer.get("patches", {}).values()) or any(transformer.get("patches_replace", {}).values())
    hooked = any(name in options for name in ("model_function_wrapper", "sampler_calc_cond_batch_function"))
    return bool(others or patched or hooked)


def compute_alike(options: dict, others: dict) -> bool:
    """Whether images may share a batch that two model options are for: no patches of other packs, which may tell images
    apart, one attention function, and otherwise the same. torch.compile makes no difference.
    """
    one, other = (without_compile(each)[0] for each in (options, others))
    if _is_patched(one) or _is_patched(other):
        return False
    return same_conditioning(_settings(one), _settings(other))


def patching_modules(options: dict) -> set[str]:
    """The modules of the functions that patch transformer blocks or guidance, by their names without packages."""
    patches = options.get("transformer_options", {}).get("patches", {}).values()
    functions = [*(patch for group in patches for patch in group), *options.get("sampler_post_cfg_function", ())]
    return {module_name(function) for function in functions}


# ---------------------------------------------------------------- evaluations


def evaluate(model: Any, conds: list, x: torch.Tensor, timestep: torch.Tensor, options: dict) -> list[torch.Tensor]:
    """Evaluate the model on conditionings, through the wrappers of `options` and no others."""
    return comfy.samplers._calc_cond_batch_outer(model, conds, x, timestep, options)


def move_patches(options: dict, device: torch.device) -> None:
    """Move what the patches of recorded options hold, as ComfyUI does it for those of the run at hand."""
    comfy.samplers.cast_transformer_options(options["transformer_options"], device=device)


def prepare_controls(model: Any, conds: list[dict]) -> None:
    comfy.samplers.pre_run_control(model, conds)


def release(conds: dict[str, list[dict]]) -> None:
    """Let ComfyUI clean up after the ControlNets of conditionings."""
    comfy.sampler_helpers.cleanup_models(conds, [])


# ---------------------------------------------------------------- conditionings


def copied_control(control: Any) -> Any:
    """A ControlNet, and those before it, with a state of their own: what they prepare for one batch must not be met by
    another. Their models are shared.
    """
    if control is None:
        return None
    copied = control.copy()
    return copied.set_previous_controlnet(copied_control(control.previous_controlnet))


def with_tensors(cond: dict, change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    """A copy of a processed conditioning in which every tensor of a value per image is changed, in lists too."""

    def changed(value: comfy.conds.CONDRegular) -> comfy.conds.CONDRegular:
        if isinstance(value.cond, torch.Tensor):
            return value._copy_with(change(value.cond))
        if isinstance(value.cond, list):  # of reference images
            return value._copy_with([change(one) if isinstance(one, torch.Tensor) else one for one in value.cond])
        return value

    found = {**cond, "model_conds": {name: changed(value) for name, value in cond["model_conds"].items()}}
    if isinstance(cond.get("mask"), torch.Tensor):
        found["mask"] = change(cond["mask"])
    return found


def same_conditioning(a: Any, b: Any) -> bool:
    """Whether two values of processed conditionings are the same, but for the uuids that tell them apart."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_conditioning(a[key], b[key]) for key in a.keys() - {"uuid"})
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_conditioning, a, b))
    if isinstance(a, comfy.conds.CONDRegular):
        return type(a) is type(b) and same_conditioning(a.cond, b.cond)
    return type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b


def stacked(conds: list[dict], images: int) -> dict | None:
    """One processed conditioning for the rows of several, under the uuid of the first: `images` rows of the first, one
    of each other. None where they cannot share a batch: areas, masks, ControlNets, or texts of other lengths.
    """
    first = conds[0]
    if any(key in cond for cond in conds for key in ALONE):
        return None
    if any(cond.get(key) != first.get(key) for cond in conds for key in WEIGHTED):
        return None
    if any(cond["model_conds"].keys() != first["model_conds"].keys() for cond in conds):
        return None
    found = {}
    for name, value in first["model_conds"].items():
        rows = [cond["model_conds"][name] for cond in conds]
        if any(type(other) is not type(value) for other in rows):
            return None
        found[name] = _stacked_values([row.cond for row in rows], images)
        if found[name] is None and value.cond is not None:
            return None
        found[name] = value._copy_with(found[name])
    return {**first, "model_conds": found}


def _stacked_values(values: list, images: int) -> Any:
    """Tensors of rows one after the other, in lists too; what is no tensor must be the same in all. None where they do
    not go together.
    """
    first = values[0]
    if isinstance(first, torch.Tensor):
        if any(value.shape[1:] != first.shape[1:] or value.ndim == 0 for value in values):
            return None
        rows = [comfy.utils.repeat_to_batch_size(first, images), *(value[:1] for value in values[1:])]
        return torch.cat([row.to(rows[0]) for row in rows])
    if isinstance(first, list):
        if any(len(value) != len(first) for value in values):
            return None
        found = [_stacked_values(list(each), images) for each in zip(*values)]
        return None if any(value is None for value in found) else found
    return first if all(same_conditioning(first, value) for value in values) else None


def fits(model: Any, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether a batch fits into the memory that is free, as ComfyUI reckons it for its own."""
    return model.memory_required(list(shape)) * 1.5 < model.current_patcher.get_free_memory(device)


def owners_of(conds: dict[str, list[dict]]) -> dict[Any, str]:
    """{uuid: role} of conditionings before they are processed."""
    return {cond["uuid"]: role for role, group in conds.items() for cond in group}


def tell_apart(conds: dict[str, list[dict]], owners: dict[Any, str]) -> None:
    """Give a uuid of its own to each processed conditioning that ComfyUI has copied from another role: where one prompt
    has an area, the others get one with that area, under the same uuid and with what this pack attached to it.
    """
    for role, group in conds.items():
        for cond in group:
            if owners.get(cond["uuid"], role) != role:
                cond["uuid"] = uuid.uuid4()
                for key in [key for key in cond if key.startswith(KEY)]:
                    del cond[key]


def processed(
    model: ModelPatcher, conditionings: dict, noise: torch.Tensor, latent_image: torch.Tensor, mask: Any
) -> dict[str, list[dict]]:
    """{role: CONDITIONING} as a guider processes them for a run."""
    prompts = {role: comfy.sampler_helpers.convert_cond(value) for role, value in conditionings.items()}
    device = noise.device
    if latent_image.count_nonzero():  # as ComfyUI asks it; a checkpoint for inpainting is shown the latent image
        latent_image = model.model.process_latent_in(latent_image)
    owners = owners_of(prompts)
    found = comfy.samplers.process_conds(model.model, noise, prompts, device, latent_image, denoise_mask=mask)
    tell_apart(found, owners)
    return found


def control_models(conds: Iterable[dict]) -> list:
    """The models of the ControlNets of processed conditionings, each once."""
    controls = dict.fromkeys(cond["control"] for cond in conds if "control" in cond)
    return list(dict.fromkeys(model for control in controls for model in control.get_models()))


# ---------------------------------------------------------------- recordings that are kept in files


def options_of(model: ModelPatcher) -> dict:
    """The model options with which a MODEL is evaluated in a run, without hooks of the conditioning."""
    options = create_model_options_clone(model.model_options)
    transformer = options.setdefault("transformer_options", {})
    for kind, things in (("wrappers", model.wrappers), ("callbacks", model.callbacks)):
        own = transformer.setdefault(kind, {})
        comfy.patcher_extension.merge_nested_dicts(own, things, copy_dict1=False)
    return options


def some_weights(model: ModelPatcher) -> list[torch.Tensor]:
    """A few weights of a MODEL's diffusion model as its file has them, before LoRAs: enough to tell checkpoints
    apart.
    """
    keys = sorted(
        key for key in model.model.state_dict() if key.startswith("diffusion_model.") and key.endswith("weight")
    )
    chosen = keys[:: max(1, len(keys) // 8)]
    return [patches[0][0] for key in chosen for patches in model.get_key_patches(key).values()]
