"""The farm: jobs and their identity, the output folder, and whole batches on a Ray cluster of two nodes."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from montage.farm import cli, jobs, store
from montage.farm import map as farm_map
from montage.farm.errors import Failure
from montage.farm.progress import Progress
from montage.farm.server import Server
from montage.farm.settings import Settings
from montage.workshop.live_server import serving

ROOT = Path(__file__).resolve().parent.parent
PHOTOMONTAGE = "photomontage (demo)"


def prompt_of(**inputs):
    return {"3": {"class_type": "KSampler", "inputs": {"seed": 5, "cfg": 3.0, "model": ["1", 0], **inputs}}}


# ---------------------------------------------------------------- jobs


def test_seeds_are_added_to_every_seed_and_the_workflow_stays_as_it_is():
    prompt, path = jobs.load_workflow(PHOTOMONTAGE)
    first, second = jobs.make_jobs(prompt, [], range(2), [path.parent])
    assert first.prompt == prompt and first.id != second.id
    assert [second.prompt[key]["inputs"]["seed"] for key in ("13", "23", "33", "44")] == [9, 20, 29, 9]
    assert (first.name, second.name) == ("seed-0000", "seed-0001")


def test_a_csv_takes_the_workflows_types_and_an_empty_cell_overrides_nothing(tmp_path):
    (tmp_path / "t.csv").write_text("name,3.seed,KSampler.cfg,3.on,3.text\nfirst,7,4,TRUE,12\nb/../b,,2.5,,\n")
    rows = jobs.read_table(tmp_path / "t.csv")
    first, second = jobs.make_jobs(prompt_of(on=False, text="x"), rows, None, [])
    assert {k: first.prompt["3"]["inputs"][k] for k in ("seed", "cfg", "on", "text")} == {
        "seed": 7,
        "cfg": 4,
        "on": True,
        "text": "12",
    }
    assert second.prompt["3"]["inputs"]["seed"] == 5 and second.name == "b-..-b"


@pytest.mark.parametrize(
    "row, words",
    [
        ({"4.seed": 1}, "node 4.* ids 3"),
        ({"3.sed": 1}, "column 3.sed .* seed, cfg, model"),
        ({"seed": 1}, "column seed is not node.input"),
        ({"3.seed": "many"}, "3.seed the value many"),
        ({"3.seed": "@nowhere.png"}, "3.seed the value @nowhere.png"),
        ({"3.text": "@nowhere.png"}, "KSampler .node 3. is to read nowhere.png"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_anything_starts(row, words):
    with pytest.raises(Failure, match=words):
        jobs.make_jobs(prompt_of(text=""), [row], None, [Path("nowhere")])


@pytest.mark.parametrize("text", ["3..1", "a..b", "1-3", ""])
def test_seeds_that_are_no_range_are_refused(text):
    with pytest.raises(Failure, match="--seeds takes A..B"):
        jobs.parse_seeds(text)


def test_a_job_is_known_by_what_it_computes_and_by_the_content_of_its_pictures(tmp_path):
    picture = tmp_path / "a.png"

    def made(**inputs):
        return jobs.make_jobs(prompt_of(**inputs), [], None, [tmp_path])[0]

    picture.write_bytes(b"one")
    first = made(image="a.png")
    ((name, path),) = first.uploads.items()
    assert path == picture and first.prompt["3"]["inputs"]["image"] == name and name.endswith("-a.png")
    shutil.copy(picture, tmp_path / "b.bin")
    assert made(image="@a.png").id == first.id and made(image="b.png").uploads == {}
    assert made(image="@b.bin").uploads.keys() != first.uploads.keys()
    picture.write_bytes(b"two")
    assert made(image="a.png").id != first.id
    titled = {key: {**node, "_meta": {"title": "t"}} for key, node in prompt_of(image="a.png").items()}
    assert jobs.make_jobs(titled, [], None, [tmp_path])[0].id == made(image="a.png").id


def test_the_input_folders_annotation_names_the_same_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")

    def made(value):
        return jobs.make_jobs(prompt_of(image=value), [], None, [tmp_path])[0]

    plain = made("a.png")
    assert len(plain.uploads) == 1
    for value in ("a.png [input]", "@a.png [input]"):
        assert made(value).id == plain.id and made(value).uploads == plain.uploads
    for value in ("a.png [output]", "a.png [temp]", "b.png [input]"):  # of a folder on the worker, or not found
        assert made(value).prompt == prompt_of(image=value) and not made(value).uploads


@pytest.mark.parametrize(
    "file, value",
    [
        ("clipspace/a.png", "clipspace/a.png [input]"),
        ("clipspace/a.png", "clipspace/a.png"),
        ("a.png", "clipspace/a.png [input]"),
        ("a.png", "clipspace/a.png"),
        ("clipspace/a.png", "@clipspace/a.png"),
        ("elsewhere/clipspace/a.png", "@elsewhere/clipspace/a.png"),
    ],
)
def test_a_painted_mask_stays_in_the_folder_clipspace(tmp_path, file, value):
    """Collage Layer's mask_is auto tells by it which way round Load Image's MASK is."""
    from montage.nodes.collage import is_alpha_of_load_image

    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"painted")
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": value}},
        "2": {"class_type": "CollageLayer", "inputs": {"mask": ["1", 1], "mask_is": "auto"}},
    }
    (job,) = jobs.make_jobs(prompt, [], None, [tmp_path / "nowhere", tmp_path])
    ((name, found),) = job.uploads.items()
    assert found == path and job.prompt["1"]["inputs"]["image"] == name
    assert name.startswith("clipspace/") and name.endswith("-a.png")
    assert not is_alpha_of_load_image(job.prompt, "2", "mask")


def test_a_painted_mask_is_looked_for_in_its_folder_first(tmp_path):
    (tmp_path / "clipspace").mkdir()
    for folder in (tmp_path, tmp_path / "clipspace"):
        (folder / "a.png").write_bytes(folder.name.encode())
    (job,) = jobs.make_jobs(prompt_of(image="clipspace/a.png [input]"), [], None, [tmp_path])
    assert list(job.uploads.values()) == [tmp_path / "clipspace" / "a.png"]


def test_a_text_that_is_too_long_for_a_file_name_names_no_file(tmp_path):
    text = "a long prompt, " * 33 + "in the style of cover.png"
    for value in (text, f"{text} [input]", f"clipspace/{text}"):
        (job,) = jobs.make_jobs(prompt_of(text=value), [], None, [tmp_path])
        assert job.prompt == prompt_of(text=value) and not job.uploads
    with pytest.raises(Failure, match="which is in none of"):
        jobs.make_jobs(prompt_of(text=f"@{text}"), [], None, [tmp_path])


def test_equal_rows_are_one_job():
    assert len(jobs.make_jobs(prompt_of(), [{"3.seed": 1}, {"3.seed": 1}, {"3.seed": 2}], None, [])) == 2


def test_workflows_that_cannot_be_run_are_named(tmp_path):
    with pytest.raises(Failure, match="does not name one workflow of ours: 06 Collage.*; 07 Collage"):
        jobs.load_workflow("collage")
    (tmp_path / "ui.json").write_text('{"nodes": [], "links": []}')
    with pytest.raises(Failure, match=r"Export \(API\)"):
        jobs.load_workflow(str(tmp_path / "ui.json"))


# ---------------------------------------------------------------- the output folder


def a_job(seed=0):
    return jobs.make_jobs(prompt_of(seed=seed), [], range(1), [])[0]


def written(folder, job):
    kept = store.Store(folder)
    kept.write(job, {"sub/a.png": b"picture"}, {"id": job.id, "name": job.name, "status": "done"})
    return kept


def test_what_is_written_is_known_to_the_next_batch(tmp_path):
    job = a_job()
    written(tmp_path, job)._lock.close()
    after = store.Store(tmp_path)
    assert after.status(job) == "done" and after.status(a_job(1)) is None
    assert (tmp_path / job.folder / "sub" / "a.png").read_bytes() == b"picture"
    assert json.loads((tmp_path / job.folder / "prompt.json").read_text()) == job.prompt
    shutil.rmtree(tmp_path / job.folder)
    assert after.status(job) is None


def test_a_driver_killed_between_the_folder_and_its_line_loses_nothing(tmp_path):
    job = a_job()
    written(tmp_path, job)._lock.close()
    line = (tmp_path / "manifest.jsonl").read_text()
    (tmp_path / "manifest.jsonl").write_text(line[: len(line) // 2])
    (tmp_path / f".{job.folder}.part").mkdir()
    after = store.Store(tmp_path)
    assert after.status(job) == "done" and (tmp_path / "manifest.jsonl").read_text() == line
    assert not list(tmp_path.glob("*.part"))


def test_two_batches_do_not_write_into_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    held = store.Store(tmp_path)
    with pytest.raises(Failure, match="Another batch is writing into"):
        store.Store(tmp_path)
    held._lock.close()
    store.Store(tmp_path)


def test_the_bar_tells_the_rate_and_what_runs_where(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    progress = Progress(4, out)
    for now[0] in (30.0, 40.0):
        progress.ended({"status": "done", "name": "seed-1", "worker": "10.0.0.1 GPU 0", "seconds": 9.0}, "")
    progress.show({"10.0.0.1 GPU 0": "seed-2 KSampler 3/20"})
    last = out.getvalue().rpartition("\r")[2]
    assert "[##########..........] 2/4, 6.0 a minute, 20 s left | 10.0.0.1 GPU 0: seed-2 KSampler 3/20" in last


def test_saved_files_are_counted_from_one_for_each_prompt():
    """ComfyUI's own numbers depend on what a server ran before."""
    outputs = {
        "12": {"images": [{"filename": f"a_{n}_.png", "subfolder": "", "type": "output"} for n in ("00007", "00010")]},
        "9": {"files": [{"filename": "b_00003.x.safetensors", "subfolder": "c", "type": "output"}], "text": ["said"]},
        "8": {"images": [{"filename": "seen_00002_.png", "subfolder": "", "type": "temp"}], "animated": [False]},
    }
    server = Server(Settings(None, None, (), None, 1, 1, 1))
    saved = server._saved(outputs)
    assert [name for name, _ in saved] == ["c/b_00001.x.safetensors", "a_00001_.png", "a_00002_.png"]
    assert [path.name for _, path in saved] == ["b_00003.x.safetensors", "a_00007_.png", "a_00010_.png"]


def test_an_upload_is_put_into_its_folder(tmp_path):
    server = Server(Settings(None, None, (), None, 1, 1, 1))
    server.input = tmp_path
    for name in ("a.png", "clipspace/a.png", "clipspace/b.png"):
        server.put(name, name.encode())
    there = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert there == {name: name.encode() for name in ("a.png", "clipspace/a.png", "clipspace/b.png")}


# ---------------------------------------------------------------- batches on a cluster

RUNS, COMPARED = 40, 6  # enough for every fault to come before the last run
NODE_ERROR, REFUSED = "raises", "refused"


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two nodes of one CPU each; the folder in which its servers work."""
    pytest.importorskip("ray", reason="Ray cannot be installed here")
    from ray.cluster_utils import Cluster

    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="farm-")
    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 << 20}  # Ray takes our word for the GPUs
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        found.folder = Path(os.environ["TMPDIR"])
        # in Ray's own folder both nodes unpack the working directory, each over the other's, under a starting worker
        found.add_node(**node, temp_dir=str(found.folder / "second"))
        yield found
    finally:
        found.shutdown()
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)


def servers(cluster):
    """The process ids of the ComfyUIs that this cluster's workers have started, zombies excluded."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if len(words) > 1 and words[1].endswith("main.py") and any(str(cluster.folder) in word for word in words):
                found.append(int(entry.name))
    return found


def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(autouse=True)
def messages(tmp_path):
    """What the drivers said is shown beside a failure."""
    yield
    for told in sorted(tmp_path.glob("*.txt")):
        print(told.name, told.read_text(), sep="\n")


ON_CPUS = ("--cpus-per-worker", "1", "--comfyui-args=--disable-api-nodes")
ON_GPUS = ("--comfyui-args=--disable-api-nodes --cpu",)


def start(cluster, told, *arguments):
    """A driver, whose messages go to the file `told`."""
    command = [sys.executable, "-m", "farm", *map(str, arguments), "--address", cluster.address]
    with open(told, "w") as messages:
        return subprocess.Popen(command, cwd=ROOT, stderr=messages)


def manifest(folder):
    path = folder / "manifest.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(condition, what, seconds=90):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.1)
    return found


def ended(folder, count):
    return until(lambda: len(manifest(folder)) >= count, f"{count} ended runs in {folder}")


def quick_photomontage(folder):
    prompt, _ = jobs.load_workflow(PHOTOMONTAGE)
    for key, node in prompt.items():
        small = {"steps": 2, "width": 64, "height": 64}
        node["inputs"].update({entry: value for entry, value in small.items() if entry in node["inputs"]})
        if node["class_type"] == "PreviewImage":
            node["class_type"], node["inputs"]["filename_prefix"] = "SaveImage", f"image-{key}"
    path = folder / "photomontage.json"
    path.write_text(json.dumps(prompt))
    return path


def bad_ones(folder):
    return {record["name"]: record for record in manifest(folder) if record["status"] != "done"}


def equal(a, b):
    """But for one level of 255: torch's rounding on a CPU depends on where its memory lies, on one server, too."""
    difference = ImageChops.difference(Image.open(a).convert("RGB"), Image.open(b).convert("RGB"))
    return max(most for _, most in difference.getextrema()) <= 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the faults are made by way of /proc")
def test_a_batch_outlives_a_killed_worker_a_hung_server_and_a_killed_driver(cluster, tmp_path):
    rows = [{"name": f"run-{n}", **{f"{key}.seed": 100 + n for key in ("13", "23", "33", "44")}} for n in range(RUNS)]
    rows.insert(0, {"name": NODE_ERROR, "44.steps": 3})  # the recordings have 2
    rows.insert(1, {"name": REFUSED, "44.sampler_name": "none such"})
    table, output = tmp_path / "table.jsonl", tmp_path / "pictures"
    table.write_text("\n".join(map(json.dumps, rows)))
    batch = (quick_photomontage(tmp_path), "--table", table, "--output", output, "--timeout", 12, *ON_CPUS)
    batch += ("--workers", 2)  # a second machine that has only just joined is not yet counted

    first, second, third = (tmp_path / f"{name}.txt" for name in ("first", "second", "third"))

    driver = start(cluster, first, *batch)
    ended(output, 4)
    until(lambda: len(servers(cluster)) == 2 and bad_ones(output).keys() == {NODE_ERROR, REFUSED}, "two workers")
    killed, hung = servers(cluster)
    os.kill(parent(killed), signal.SIGKILL)
    ended(output, 8)
    os.kill(hung, signal.SIGSTOP)
    until(lambda: "No progress for 12 s" in first.read_text(), "report of the hung server")
    ended(output, 14)
    driver.kill()
    driver.wait()
    assert "the worker died" in first.read_text()
    until(lambda: not servers(cluster), "end of the servers", 30)
    before = len(manifest(output))
    assert before < len(rows)

    driver = start(cluster, second, *batch)
    assert driver.wait(300) == 1 and f"{len(rows)} runs, {before} of them already" in second.read_text()
    records = manifest(output)
    assert Counter(record["name"] for record in records) == Counter(row["name"] for row in rows)
    bad = bad_ones(output)
    assert bad.keys() == {NODE_ERROR, REFUSED}
    assert all((record["status"], record["attempts"]) == ("failed", 1) for record in bad.values())
    assert "KSampler (node 44)" in bad[NODE_ERROR]["error"] and "none such" in bad[REFUSED]["error"]
    assert bad[NODE_ERROR]["error"] in second.read_text()
    assert {path.name for path in output.iterdir() if path.is_dir()} == {r["folder"] for r in records if "folder" in r}

    assert start(cluster, third, *batch).wait(30) == 1
    assert f"{len(rows)} of them already" in third.read_text() and len(manifest(output)) == len(rows)
    (tmp_path / "alone").mkdir()
    retried = sorted((r for r in records if r["status"] == "done"), key=lambda record: -record["attempts"])
    # the killed worker and the hung server may have held the same run, on a slow machine
    assert [record["attempts"] for record in retried[:3]] in ([2, 2, 1], [2, 1, 1], [3, 1, 1])
    with serving(tmp_path / "alone") as alone:
        for record in retried[:COMPARED]:
            folder = output / record["folder"]
            shown = alone.run(json.loads((folder / "prompt.json").read_text()), record["name"])
            images = [image for node in sorted(shown, key=int) for image in shown[node].get("images", ())]
            assert len(images) == len(record["files"]) == 6
            for image, name in zip(images, record["files"], strict=True):
                there = tmp_path / "alone" / "output" / image["subfolder"] / image["filename"]
                assert equal(there, folder / name), name
                assert Image.open(there).text == Image.open(folder / name).text


def split(whole):
    """The photomontage in two workflows, that of one image of its stack and that of its composite; the images' rows."""
    one = {key: node for key, node in whole.items() if int(key) < 20}
    one["50"] = {"class_type": "SaveRecording", "inputs": {"latent": ["13", 0], "model": ["1", 0]}}
    one["50"]["inputs"]["filename_prefix"] = "recordings/image"
    recorded = [f"{ten}{one}" for ten in "123" for one in "123"]  # each image's empty latent, recorder and sampler
    composite = {key: node for key, node in whole.items() if key not in recorded}
    rows = []
    for ten in "123":
        conditioning = {"positive": [f"{ten}6", 0], "negative": [f"{ten}6", 1]}
        load = {"file": "to be named", "model": ["1", 0], **conditioning}
        composite[f"{ten}3"] = {"class_type": "LoadRecording", "inputs": load}
        text, seed = whole[f"{ten}0"]["inputs"]["text"], whole[f"{ten}3"]["inputs"]["seed"]
        rows.append({"name": f"image-{ten}", "10.text": text, "13.seed": seed})
    return one, composite, rows


@pytest.mark.slow
def test_a_stack_is_sampled_on_many_workers_and_composed_on_one(cluster, tmp_path):
    """In two batches that go by files; the second one reads a picture, too."""
    whole = json.loads(quick_photomontage(tmp_path).read_text())
    one, composite, rows = split(whole)
    composite["60"] = {"class_type": "LoadImage", "inputs": {"image": "to be named"}}
    composite["61"] = {"class_type": "SaveImage", "inputs": {"images": ["60", 0], "filename_prefix": "seen"}}
    (tmp_path / "one.json").write_text(json.dumps(one))
    (tmp_path / "composite.json").write_text(json.dumps(composite))
    (tmp_path / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stack, composed, alone, told = (tmp_path / name for name in ("stack", "composed", "alone", "told.txt"))

    sampling = (tmp_path / "one.json", "--table", tmp_path / "images.jsonl", "--output", stack, *ON_GPUS)
    assert start(cluster, told, *sampling).wait(120) == 0, told.read_text()
    made = {record["name"]: stack / record["folder"] for record in manifest(stack)}
    workers = {record["worker"] for record in manifest(stack)}
    assert workers and all(" GPU 0 " in worker for worker in workers)  # the first may be done before the second is up

    Image.new("RGB", (8, 8), "teal").save(tmp_path / "teal.png")
    files = [f"@{made[row['name']]}/recordings/image_00001.recording.safetensors" for row in rows]
    (tmp_path / "t.csv").write_text(
        "name,13.file,23.file,33.file,LoadImage.image\n" + ",".join(["c", *files, "teal.png"])
    )
    composing = (tmp_path / "composite.json", "--table", tmp_path / "t.csv", "--output", composed, *ON_GPUS)
    assert start(cluster, told, *composing).wait(120) == 0, told.read_text()
    at_once = (tmp_path / "photomontage.json", "--output", alone, *ON_GPUS)
    assert start(cluster, told, *at_once).wait(120) == 0, told.read_text()
    (result,), (reference,) = manifest(composed), manifest(alone)
    assert set(result["files"]) == {*reference["files"], "seen_00001_.png"} and len(reference["files"]) == 6
    for name in reference["files"]:
        assert equal(composed / result["folder"] / name, alone / reference["folder"] / name), name
    assert equal(composed / result["folder"] / "seen_00001_.png", tmp_path / "teal.png")


@pytest.mark.slow
def test_a_function_is_mapped_over_the_cluster_and_outlives_its_process(cluster, tmp_path):
    import ray

    def prepare():
        import sys

        sys.path.append("prepared")

    def measure(item):
        import os
        import sys

        died = tmp_path / "died"
        if item == 3 and not died.exists():
            died.touch()
            os._exit(1)
        return {"square": item**2, "prepared": sys.path.count("prepared"), "dev": os.path.exists("dev.py")}

    try:
        found = dict(farm_map(measure, range(6), cluster.address, prepare=prepare))
        assert found == {item: {"square": item**2, "prepared": 1, "dev": True} for item in range(6)}
        assert (tmp_path / "died").exists()
        with pytest.raises(ZeroDivisionError):
            list(farm_map(lambda item: 1 / item, [0, 1], cluster.address))
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_a_study_of_the_evidence_is_measured_on_the_cluster(cluster, tmp_path):
    import ray

    from montage.evidence import measurements

    def measure(sample):
        import torch

        from montage.kernels import graphcut

        return {"pack": {"sample": sample, "inference": torch.is_inference_mode_enabled(), "cut": bool(graphcut)}}

    try:
        found = measurements.Study("study", tmp_path).run(range(4), measure, cluster.address)
    finally:
        ray.shutdown()
    assert found.of("pack", "sample") == [0, 1, 2, 3] and all(found.of("pack", "inference"))
    again = measurements.Study("study", tmp_path)
    assert sorted(again.samples) == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_demos_evaluation_finds_on_a_cluster_what_it_finds_here(cluster, tmp_path):
    """Every kind of drawing in more than one part; the pictures to the last bit."""

    def evaluated(name, *more):
        results = tmp_path / f"{name}.json"
        small = ["--n", "24", "--pairs", "9", "--steps", "1", "--only", "prompts", "swap", "controlnet", "subject"]
        command = [sys.executable, "demo/evaluate.py", *small, "--results", results, "--pictures", tmp_path / name]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}  # as Ray's workers have
        subprocess.run([*command, *more], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, check=True, timeout=300)
        found = json.loads(results.read_text())
        assert found["prompts"].pop("seconds") > 0
        return found, {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    alone = evaluated("here")
    assert alone == evaluated("cluster", "--address", cluster.address)
    assert len(alone[1]) == 4


def test_the_command_line_tells_failures_in_a_sentence(tmp_path, capsys):
    assert cli.main(["nothing of the kind", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("There is no file nothing of the kind")
