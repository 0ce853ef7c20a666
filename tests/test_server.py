"""The pack on a real server, through its API: what is listed, what runs, and what survives caches and cancels."""

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from montage import dev
from montage.workshop.live_server import serving
from montage.workshop.workflows import PHOTOMONTAGE, equal, picture, quick, workflow

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def forget(server):
    """Empty every cache of the server."""
    server.call("/free", {"unload_models": True, "free_memory": True}, parse=False)
    time.sleep(1.5)  # the executor does it between two prompts


def evict(server, node):
    return server.call(f"/montage_test/evict/{node}", {})["evicted"]


def test_the_nodes_are_listed_with_a_tooltip_everywhere(server):
    nodes = {
        name: node
        for name, node in server.call("/object_info").items()
        if node["python_module"] == "custom_nodes.montage"
    }
    assert {"FeatureRecorder", "GraphCutMontage", "CompositeAttentionInject", "MontageDemoModel"} <= nodes.keys()
    for name, node in nodes.items():
        assert node["category"].startswith("montage") and node["description"], name
        for group in ("required", "optional"):
            for key, value in node["input"].get(group, {}).items():
                assert value[1].get("tooltip"), f"{name}.{key} has no tooltip"
        assert all(node["output_tooltips"]) and len(node["output_tooltips"]) == len(node["output"]), name


def test_node_search_is_told_what_people_type(server):
    """The page searches the aliases that the server lists (tests/test_release.py has more words)."""
    listed = [
        alias.lower()
        for node in server.call("/object_info").values()
        if node["python_module"] == "custom_nodes.montage"
        for alias in node["search_aliases"] or ()
    ]
    typed = ("inpaint", "mask from text", "style transfer", "sam", "seam", "regional prompt", "character swap")
    assert [words for words in typed if not any(words in alias for alias in listed)] == []


def test_the_log_has_no_complaint_about_the_pack(server):
    complaints = [
        line
        for line in server.log.read_text(errors="replace").splitlines()
        if "montage" in line.lower() and any(word in line.lower() for word in ("warn", "error", "fail", "traceback"))
    ]
    assert not complaints


def test_loading_costs_little_and_imports_nothing_optional():
    """Beyond ComfyUI's own imports: under 0.3 s, and no optional package."""
    code = """if True:
        import sys, time, asyncio, importlib.util
        sys.path.insert(0, sys.argv[1])
        import comfy.options; comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args; args.cpu = True
        import nodes, comfy_extras.nodes_custom_sampler, comfy_api.latest, folder_paths
        before, began = set(sys.modules), time.process_time()
        folder = sys.argv[2]
        spec = importlib.util.spec_from_file_location(
            "montage", folder + "/__init__.py", submodule_search_locations=[folder]
        )
        module = sys.modules["montage"] = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
        async def load():
            extension = await module.comfy_entrypoint()
            for node in await extension.get_node_list(): node.GET_SCHEMA()
        asyncio.run(load())
        print(time.process_time() - began, *(set(sys.modules) - before))"""
    out = subprocess.run(
        [sys.executable, "-c", code, os.environ["COMFYUI_PATH"], str(ROOT)], capture_output=True, text=True, check=True
    ).stdout.split()
    names = {name.partition(".")[0] for name in out[1:]}
    assert not names & {"gco", "skimage", "matplotlib", "segment_anything", "groundingdino", "torchvision"}
    assert float(out[0]) < 0.3  # seconds of this process, not of the clock


def test_the_photomontage_runs_and_is_the_same_again(server):
    first = picture(server, server.run(workflow(PHOTOMONTAGE), "first"))
    assert first.size == (128, 128) and len(first.getcolors(1 << 24)) > 1000
    forget(server)
    assert equal(picture(server, server.run(workflow(PHOTOMONTAGE), "again")), first)


@pytest.mark.parametrize(
    "name, node, count",
    [
        ("15 Personal subject, new layout (demo)", "53", 1),
        ("16 Personal subject, four layouts (demo)", "53", 4),
        ("17 Personal subject in your picture (demo)", "35", 1),
        ("11 Subject swap (demo)", "44", 1),
        ("12 Subject insertion (demo)", "44", 1),
        ("13 Subject generation (demo)", "44", 1),
    ],
)
def test_the_subjects_run(server, name, node, count):
    images = server.run(quick(workflow(name)), name)[node]["images"]
    shown = [Image.open(server.base / "output" / image["subfolder"] / image["filename"]) for image in images]
    assert len(shown) == count and all(
        image.size == (128, 128) and len(image.convert("RGB").getcolors(1 << 24)) > 1000 for image in shown
    )


@pytest.mark.parametrize("name", ["19 Photomontage on a transformer (demo)", "23 Recordings in files (demo)"])
def test_a_photomontage_on_the_transformer_runs(server, name):
    outputs = server.run(quick(workflow(name)), name)
    image, other, regions, composite = (picture(server, outputs, node) for node in ("15", "25", "31", "36"))
    assert not equal(image, composite) and not equal(other, composite) and len(regions.getcolors(1 << 24)) > 1
    assert composite.size == (128, 128) and len(composite.getcolors(1 << 24)) > 1000


def test_saved_recordings_are_loaded_in_the_same_run_and_in_a_later_one(server):
    """By Save Recording's filename, and by the name that the list then has."""
    prompt = quick(workflow("23 Recordings in files (demo)"))
    for node in ("16", "26"):
        prompt[node]["inputs"]["filename_prefix"] = f"recordings/again-{node}"
    outputs = server.run(prompt, "saved")
    listed = server.call("/object_info/LoadRecording")["LoadRecording"]["input"]["required"]["file"][1]["options"]
    for save, load in (("16", "17"), ("26", "27")):
        (saved,) = outputs[save]["recordings"]
        prompt[load]["inputs"]["file"] = f"{saved['subfolder']}/{saved['filename']} [output]"
        assert prompt[load]["inputs"]["file"] in listed
        del prompt[save]
    again = server.run(prompt, "loaded")
    assert equal(picture(server, outputs, "36"), picture(server, again, "36"))


def test_another_seed_and_back_pairs_every_latent_with_its_own_history(server):
    def run(seed):
        prompt = quick(workflow(PHOTOMONTAGE))
        prompt["23"]["inputs"]["seed"] = seed
        return picture(server, server.run(prompt, f"seed {seed}"))

    forget(server)
    first, other, back = run(6), run(7), run(6)
    assert equal(first, back) and not equal(first, other)
    forget(server)
    assert equal(run(7), other)


def test_evicting_any_one_output_changes_nothing(server):
    prompt = quick(workflow(PHOTOMONTAGE))
    prompt["2"]["inputs"]["text"] = "at night"  # equal nodes share an output, and the base's prompt is empty too
    forget(server)
    reference = picture(server, server.run(prompt, "reference"))
    for seed, node in enumerate(sorted(prompt, key=int)):
        again = copy.deepcopy(prompt)
        again["44"]["inputs"]["seed"] = 1000 + seed  # makes the composite run; its noise is the base's all the same
        evicted = evict(server, node)
        assert evicted or prompt[node]["class_type"] in ("SaveImage", "PreviewImage"), node
        assert equal(picture(server, server.run(again, f"without {node}")), reference), (
            f"evicted {node} ({prompt[node]['class_type']})"
        )


def test_evicting_a_sampler_and_its_recorder_with_another_seed(server):
    def with_seed(seed):
        prompt = quick(workflow(PHOTOMONTAGE))
        prompt["33"]["inputs"]["seed"] = seed
        return prompt

    forget(server)
    reference = {seed: picture(server, server.run(with_seed(seed), "reference")) for seed in (1, 2)}
    for node in ("32", "33", "43"):
        server.run(with_seed(1), "before")
        evict(server, node)
        assert equal(picture(server, server.run(with_seed(2), f"without {node}")), reference[2])


def test_a_cancelled_composite_leaves_the_next_run_as_it_was(server):
    prompt = quick(workflow(PHOTOMONTAGE))
    reference = picture(server, server.run(prompt, "reference"))
    long = workflow(PHOTOMONTAGE)
    for node in ("13", "23", "33", "44"):
        long[node]["inputs"]["steps"] = 60
    queued = server.call("/prompt", {"prompt": long})["prompt_id"]
    time.sleep(4)
    server.call("/interrupt", {}, parse=False)
    assert any(kind == "execution_interrupted" for kind, _ in server.end(queued, seconds=60)["status"]["messages"])
    changed = quick(workflow(PHOTOMONTAGE))
    changed["44"]["inputs"]["seed"] = 4321
    assert equal(picture(server, server.run(changed, "after")), reference)


@pytest.mark.parametrize(
    "change, part",
    [
        (
            lambda p: p["40"]["inputs"].update(strokes='{"v":1,"base":0,"strokes":[{"k":3,"r":9,"p":[0,0]}]}'),
            "Graph Cut Montage: stroke 0 is on image 3, and there are 3 images",
        ),
        (
            lambda p: p["44"]["inputs"].update(steps=9),
            "Composite Attention Inject: its images were recorded over 3 steps",
        ),
        (
            lambda p: p["43"]["inputs"].update(sites="d9"),
            'Composite Attention Inject: sites: "d9": this model has no d9',
        ),
        (
            lambda p: p["43"]["inputs"].update(masks=["40", 0], **{"latents.latent2": ["11", 0]}),
            "latent 2 was not recorded",
        ),
    ],
)
def test_errors_reach_the_api_in_one_sentence(server, change, part):
    prompt = quick(workflow(PHOTOMONTAGE))
    change(prompt)
    with pytest.raises(dev.Failure) as failure:
        server.run(prompt, "wrong")
    assert part in str(failure.value)


def test_a_server_whose_owner_likes_it_fast_gives_the_same(server, tmp_path):
    prompt = quick(workflow(PHOTOMONTAGE))
    with serving(tmp_path, "--fast", "fp16_accumulation") as second:
        assert equal(*(picture(each, each.run(prompt, "the same")) for each in (server, second)))


# ---------------------------------------------------------------- collages


def pictures(server, outputs):
    """{name of a SaveImage's picture, without its number: its files}."""
    found = {}
    for shown in outputs.values():
        for image in shown.get("images", ()):
            if image["type"] == "output":
                path = server.base / "output" / image["subfolder"] / image["filename"]
                found.setdefault(path.name.rsplit("_", 2)[0], []).append(Image.open(path).convert("RGB"))
    return found


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "06 Collage (demo)",
            ["collage", "collage-22-composited-layers", "collage-33-baseline-plain-img2img"],
        ),
        (
            "08 Collage, denoise per layer (demo)",
            [
                "collage-denoise",
                "collage-denoise-22-composited-layers",
                "collage-denoise-44-baseline-denoise-0-9-for-all",
            ],
        ),
        (
            "10 Collage with textual inversion (demo)",
            [
                "collage-embedding",
                "collage-embedding-22-composited-layers",
                "collage-embedding-26-training-loss",
                "collage-embedding-34-without-the-embedding",
            ],
        ),
    ],
)
def test_a_collage_runs(server, name, expected):
    prompt = dev.save_previews(quick(workflow(name)))
    found = pictures(server, server.run(prompt, name))
    assert sorted(found) == expected
    collage, *_, without = (found[picture][0] for picture in expected)
    assert collage.size == (128, 128) and len(collage.getcolors(1 << 24)) > 1000 and not equal(without, collage)


@pytest.mark.parametrize(
    "name",
    [
        "06 Collage",
        "08 Collage, denoise per layer",
        "10 Collage with textual inversion",
        "09 Collage, iterative object editing",
        "11 Subject swap",
        "12 Subject insertion",
        "13 Subject generation",
        "05 Photomontage with a photo",
    ],
)
def test_a_workflow_runs_on_the_structure_of_sdxl(server, name):
    prompt = dev.save_previews(quick(workflow(f"{name} (demo)")))
    (loader,) = (number for number, node in prompt.items() if node["class_type"] == "MontageDemoModel")
    for node in prompt.values():
        for key, value in node["inputs"].items():
            if value in ([loader, 0], [loader, 1]):  # its MODEL and CLIP, not its VAE
                node["inputs"][key] = ["sdxl", value[1]]
        if node["class_type"] == "LearnLayerToken":
            node["inputs"]["name"] = "sdxl"
    prompt["sdxl"] = {"class_type": "MontageTestStructure", "inputs": {"name": "sdxl-small"}}
    found = pictures(server, server.run(prompt, name))
    assert all(
        len(picture.getcolors(1 << 24)) > 100
        for kind, those in found.items()
        if "regions" not in kind
        for picture in those
    )


def test_one_object_is_made_again_while_all_others_stay(server):
    prompt = dev.save_previews(quick(workflow("09 Collage, iterative object editing (demo)")))
    found = pictures(server, server.run(prompt, "again"))
    before = found["collage-iterative-34-first-collage"][0]
    for ten, one, box in (
        ("-211-ten-stars", "-213-picked-star", (64, 0, 128, 64)),
        ("-311-ten-boxes", "", (46, 56, 120, 128)),
    ):  # where the new object lies, with the blur around it
        first, second = found[f"collage-iterative{ten}"]
        (picked,) = found[f"collage-iterative{one}"]
        assert equal(picked, first) and not equal(first, second)
        changed = ImageChops.difference(before, picked).getbbox()
        assert (
            changed and changed[0] >= box[0] and changed[1] >= box[1] and changed[2] <= box[2] and changed[3] <= box[3]
        )
        before = picked


# ---------------------------------------------------------------- the SD1.5 workflows on a model of full size


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A server whose models are a full-size SD1.5 checkpoint and ControlNet with random weights."""
    import comfy.utils
    import torch

    from montage.workshop.random_models import control_net, half_weights, save_checkpoint

    base = tmp_path_factory.mktemp("full-size")
    for folder in ("models/controlnet", "models/loras", "input"):
        (base / folder).mkdir(parents=True)
    save_checkpoint(base / "models/checkpoints/v1-5-pruned-emaonly-fp16.safetensors")
    with torch.no_grad():
        control = half_weights(control_net("sd15").control_model, "control_model.")
    comfy.utils.save_torch_file(control, str(base / "models/controlnet/control_v11p_sd15_canny_fp16.safetensors"))
    lora = {
        f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_{part}.weight": torch.full(shape, 0.01)
        for part, shape in (("up", (1280, 1)), ("down", (1, 1280)))
    }
    comfy.utils.save_torch_file(lora, str(base / "models/loras/my-subject.safetensors"))
    Image.effect_noise((64, 64), 80).convert("RGB").save(base / "input/example.png")
    with serving(base) as running:
        yield running


def test_the_sd15_workflow_runs_on_a_model_of_full_size(full_size):
    prompt = quick(workflow("02 Photomontage with ControlNet (SD1.5)"), steps=1)
    for node in prompt.values():
        if node["class_type"] in ("EmptyLatentImage", "ImageScale"):
            node["inputs"].update(width=64, height=64)
        if "batch_size" in node["inputs"]:
            node["inputs"]["batch_size"] = 2
    outputs = full_size.run(prompt, "SD1.5")
    assert len(outputs["17"]["images"]) == 2
    assert picture(full_size, outputs, "18").size == (64, 64)
    assert len(picture(full_size, outputs, "19").getcolors(1 << 24)) > 10


def test_the_sd15_workflow_of_a_personal_subject_runs_on_a_model_of_full_size(full_size):
    prompt = quick(workflow("14 Personal subject (SD1.5)"))
    for node in prompt.values():
        if node["class_type"] in ("EmptyLatentImage", "ImageScale"):
            node["inputs"].update(width=64, height=64)
    outputs = full_size.run(prompt, "SD1.5")
    assert len(outputs["41"]["images"]) == 6
    assert picture(full_size, outputs, "53").size == (64, 64)
    assert len(picture(full_size, outputs, "53").getcolors(1 << 24)) > 10


def test_the_sd15_collage_runs_on_a_model_of_full_size(full_size):
    prompt = quick(workflow("07 Collage with ControlNet (SD1.5)"), steps=1)
    for node in prompt.values():
        if node["class_type"] == "CollageCanvas":
            node["inputs"].update(width=64, height=64)
    outputs = full_size.run(prompt, "SD1.5")
    assert picture(full_size, outputs, "23").size == picture(full_size, outputs, "30").size == (64, 64)
    assert len(picture(full_size, outputs, "30").getcolors(1 << 24)) > 10


def test_a_look_is_learned_on_a_model_of_full_size(full_size):
    """SD1.5 in half precision, at its own size of text and embedding."""
    prompt = workflow("10 Collage with textual inversion (demo)")
    prompt["1"] = {
        "class_type": "CheckpointLoaderSimple",
        "inputs": {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"},
    }
    prompt["20"]["inputs"].update(width=64, height=64)
    prompt["25"]["inputs"].update(steps=1, preview_every=0, name="full-size")
    keep = {"1", "10", "11", "20", "25", "26"}
    full_size.run({number: node for number, node in prompt.items() if number in keep}, "learn")
    import comfy.utils

    found = comfy.utils.load_torch_file(str(full_size.base / "models/embeddings/full-size.safetensors"))
    assert found["clip_l"].shape == (1, 768)
