"""What a stranger's code must not do on somebody's machine: run what it reads, open a door, or touch files outside of
ComfyUI's folders.
"""

import ast

import folder_paths
import pytest
import torch

from montage.workshop.package_contents import ROOT, shipped_modules

FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "breakpoint",
    "input",
    "torch.load",
    "torch.hub",
    "torch.jit.load",
    "numpy.load",
    "np.load",
    "os.system",
    "os.popen",
    "importlib.import_module",
    "runpy",
}
MODULES = {
    "pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "subprocess",
    "socket",
    "ctypes",
    "urllib",
    "http",
    "requests",
    "aiohttp",
    "server",
    "app",
    "huggingface_hub",
    "pip",
}
TOUCHES = {
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "save",
    "save_file",
    "load_file",
    "safe_open",
    "load_torch_file",
    "save_torch_file",
    "load_checkpoint_guess_config",
    "load_lora",
    "mkdir",
    "makedirs",
    "touch",
    "unlink",
    "rmtree",
    "rename",
    "symlink_to",
    "os.replace",
    "os.remove",
    "shutil.copy",
    "shutil.move",
    "tempfile.mkdtemp",
}
ALLOWED = {  # (file, function): what it touches
    ("nodes/previews.py", "numbers"): "ComfyUI's temp folder, under a name made of a hash",
    ("nodes/previews.py", "write"): "the same",
    ("nodes/previews.py", "put"): "the same",
    ("nodes/record.py", "execute"): "a recording in ComfyUI's output or input folder",
    ("nodes/demo_model.py", "execute"): "the pack's own weights",
    (
        "nodes/textual_inversion.py",
        "path",
    ): "the folder in which the CLIP looks for embeddings; it may not be there yet",
    ("patching/textual_inversion.py", "save"): "an embedding there, of a name without folders",
    ("patching/textual_inversion.py", "learn"): "the same, on the way",
    ("patching/textual_inversion.py", "load"): "an embedding there, tensors only",
    ("patching/recording_files.py", "save"): "a recording in ComfyUI's output folder",
    ("patching/recording_files.py", "load"): "a recording in its input or output folder, tensors only",
    ("localize/files.py", "read_weights"): "a file that ComfyUI found in its model folders, tensors only",
    ("localize/vocabulary.py", "read_vocabulary"): "a word list that ComfyUI found in its model folders",
}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(tree):
    """Every call: (the name of the function around it, what is called, the call)."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                yield inside, dotted(child.func), child
            yield from walk(child, child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else inside)

    return walk(tree, None)


def modules():
    return [
        (path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in shipped_modules()
    ]


def test_nothing_runs_what_it_reads_and_nothing_opens_a_door():
    for name, tree in modules():
        for node in ast.walk(tree):
            imported = (
                {alias.name for alias in node.names}
                if isinstance(node, ast.Import)
                else {node.module or ""}
                if isinstance(node, ast.ImportFrom) and not node.level
                else set()
            )
            assert not {one.partition(".")[0] for one in imported} & MODULES, f"{name}:{node.lineno} imports {imported}"
        for _, what, call in calls(tree):
            assert what not in FORBIDDEN, f"{name}:{call.lineno} calls {what}"
            assert what.rpartition(".")[2] != "load_torch_file" or any(
                k.arg == "safe_load" and k.value.value is True for k in call.keywords
            ), f"{name}:{call.lineno}"


def test_files_are_touched_in_known_places_only():
    found = {
        (name, inside)
        for name, tree in modules()
        for inside, what, _ in calls(tree)
        if what in TOUCHES
        or ("." in what and not what.startswith(("os.", "shutil.")) and what.rpartition(".")[2] in TOUCHES)
    }
    assert found == set(ALLOWED)


def test_no_node_asks_for_a_place_on_disk():
    """Names of model files come from ComfyUI's lists; nothing takes a path."""
    from montage.workshop.package_contents import schemas

    for schema in schemas():
        for one in schema.inputs:
            if (schema.node_id, one.id) == ("LoadRecording", "file"):  # a name inside of two folders: tested below
                continue
            assert not any(word in one.id.split("_") for word in ("path", "folder", "directory", "file", "url")), (
                f"{schema.node_id}.{one.id}"
            )


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..\\outside", "sub/../../outside"])
@pytest.mark.parametrize("note", ["", " [output]", " [temp]"])
def test_a_recording_cannot_leave_its_folder(name, note, tmp_path, monkeypatch):
    from montage.nodes.record import LoadRecording, path_of

    for folder in ("input", "output", "temp"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        monkeypatch.setattr(folder_paths, f"{folder}_directory", str(tmp_path / folder))
    (tmp_path / "outside.recording.safetensors").write_bytes(b"")
    (tmp_path / "output" / "inside.recording.safetensors").write_bytes(b"")
    assert path_of("inside.recording.safetensors [output]")
    assert path_of(f"{name}.recording.safetensors{note}") is None
    assert "there is no file" in LoadRecording.validate_inputs(f"{name}.recording.safetensors{note}")


OUTSIDE = ["../outside.pth", "../../outside.pth", "/etc/passwd", "..\\outside.pth", "sub/../../outside.pth"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_model_name_cannot_leave_its_folder(name, tmp_path, monkeypatch):
    from montage.localize import Problem, files

    inside = tmp_path / "models" / "sams"
    inside.mkdir(parents=True)
    for folder in (tmp_path, inside.parent):
        torch.save({"a": torch.zeros(1)}, folder / "outside.pth")
    for key in files.PUBLISHED:
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(inside)], set()))
        with pytest.raises(Problem, match="is not|no file|put it|missing"):
            files.read_weights(key, name)
