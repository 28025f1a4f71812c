"""What is handed to a cluster."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import ray
import yaml

import ksmdist

from .conftest import PAGE, ZERO, MakeImage, elf_core, manifest, page, table_files

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "jobs").glob("*.py"))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_thin_and_answer(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 25
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
    assert imported <= set(sys.stdlib_module_names) | {"ray", "ksmdist"}
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "IMAGE..." in done.stdout


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


# cluster.yaml


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """cluster.yaml as `ray up` takes it, with Ray's defaults filled in."""
    from ray.autoscaler._private.util import prepare_config

    config: dict[str, Any] = prepare_config(load("cluster.yaml"))
    return config


def test_rays_loader_takes_cluster_yaml_and_no_other_key(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config({**prepared, "max_worker": 8})


def test_the_cluster_grows_and_shrinks(prepared: dict[str, Any]) -> None:
    kinds = prepared["available_node_types"]
    workers = [kind for name, kind in kinds.items() if name != prepared["head_node_type"]]
    assert [worker["min_workers"] for worker in workers] == [0]
    assert 0 < workers[0]["max_workers"] <= prepared["max_workers"]
    assert prepared["idle_timeout_minutes"] > 0


def test_the_cluster_asks_for_a_token_and_shows_its_dashboard_to_the_head_alone(prepared: dict[str, Any]) -> None:
    (head,) = [line for line in prepared["head_start_ray_commands"] if "ray start" in line]
    (worker,) = [line for line in prepared["worker_start_ray_commands"] if "ray start" in line]
    for line in (head, worker):
        assert re.search(r"\bRAY_AUTH_MODE=token ray start\b", line)
        assert "RAY_AUTH_TOKEN=" not in line
    assert "--dashboard-host=127.0.0.1" in head.split()
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head.split()
    assert prepared["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--volume=/images:/images:ro" in prepared["docker"]["run_options"]


# runtime_env.yaml


def test_ray_takes_the_runtime_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    config = load("jobs/runtime_env.yaml")
    assert RuntimeEnv(**config).to_dict() == config
    assert set(config) <= set(RuntimeEnv.known_fields)


def test_entry_scripts_travel_and_nothing_else(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "jobs"
    shutil.copytree(ROOT / "jobs", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for stray in ("vm.raw", "vm.elf", "core", ".hidden", "below/vm.arrow"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_bytes(ZERO)
    package = tmp_path / "package.zip"
    create_package(str(folder), package, True, excludes=load("jobs/runtime_env.yaml")["excludes"])
    shutil.unpack_archive(package, tmp_path / "there")
    there = {str(path.relative_to(tmp_path / "there")) for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert there == {script.name for script in SCRIPTS}


# scan.rayjob.yaml


def strict(schema: Any) -> Any:
    """A schema of Kubernetes that forbids what an API server drops: fields that it does not know."""
    told = dict(schema)
    if "properties" in told:
        told["properties"] = {name: strict(value) for name, value in told["properties"].items()}
        if not told.get("x-kubernetes-preserve-unknown-fields"):
            told.setdefault("additionalProperties", False)
    if told.get("x-kubernetes-int-or-string"):
        told["type"] = ["integer", "string"]
    for key in ("items", "additionalProperties"):
        if isinstance(told.get(key), dict):
            told[key] = strict(told[key])
    return told


@pytest.fixture(scope="module")
def check() -> Callable[[Any], None]:
    with gzip.open(ROOT / "tests" / "data" / "rayjob-1.7.0.json.gz", "rt") as source:
        schema = strict(json.load(source))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    return lambda document: validator.validate(document)


@pytest.fixture
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = copy.deepcopy(load("jobs/scan.rayjob.yaml"))
    return json.loads(json.dumps(loaded))  # type: ignore[no-any-return]  # no anchors shared


def pods(job: Mapping[str, Any]) -> dict[str, Any]:
    """Specs of all pods of a RayJob, by what they are."""
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {
        "submitter": spec["submitterPodTemplate"]["spec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        **workers,
    }


def containers(job: Mapping[str, Any]) -> list[Any]:
    """All containers that the manifest names, and what it says of the autoscaler's, which KubeRay adds."""
    named = [one for pod in pods(job).values() for one in pod["containers"] + pod.get("initContainers", [])]
    return [*named, job["spec"]["rayClusterSpec"]["autoscalerOptions"]]


def test_the_manifest_is_a_ray_job(job: dict[str, Any], check: Callable[[Any], None]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check(job)


@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        ("spec", "shutdownAfterJobFinishes", "shutdownAfterJobFinished"),
        ("spec rayClusterSpec", "enableInTreeAutoscaling", "enableAutoscaling"),
        ("spec rayClusterSpec headGroupSpec template spec securityContext", "runAsNonRoot", "runAsNonroot"),
        ("spec rayClusterSpec headGroupSpec template spec containers 0 resources", "limits", "limit"),
        ("spec rayClusterSpec workerGroupSpecs 0", "maxReplicas", "maxreplicas"),
        ("spec rayClusterSpec workerGroupSpecs 0 template spec containers 0 volumeMounts 0", "readOnly", "readonly"),
        ("spec submitterPodTemplate spec containers 0 securityContext", "capabilities", "capability"),
    ],
)
def test_a_misspelt_field_is_found(
    job: dict[str, Any], check: Callable[[Any], None], path: str, right: str, wrong: str
) -> None:
    node: Any = job
    for step in path.split():
        node = node[int(step) if step.isdigit() else step]
    node[wrong] = node.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=f"'{wrong}' (was|were) unexpected|is a required property"):
        check(job)


@pytest.mark.parametrize("value", [["16Gi"], "16 GB", True])
def test_a_quantity_that_is_none_is_found(job: dict[str, Any], check: Callable[[Any], None], value: object) -> None:
    pods(job)["head"]["containers"][0]["resources"]["limits"]["memory"] = value
    with pytest.raises(jsonschema.ValidationError):
        check(job)


def test_no_container_is_root_or_unlimited(job: dict[str, Any]) -> None:
    for pod in pods(job).values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert len(containers(job)) == 4
    for container in containers(job):
        context = container["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in context
        for bound in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][bound])


def test_images_are_read_only_and_runs_are_shared(job: dict[str, Any]) -> None:
    there = pods(job)
    del there["submitter"]
    for pod in there.values():
        mounts = {mount["mountPath"]: mount for container in pod["containers"] for mount in container["volumeMounts"]}
        claims = {volume["name"]: volume["persistentVolumeClaim"] for volume in pod["volumes"]}
        assert mounts["/images"]["readOnly"] is True
        assert claims[mounts["/images"]["name"]]["readOnly"] is True
        assert "readOnly" not in mounts["/runs"]
        assert claims[mounts["/runs"]["name"]] == {"claimName": "ksmdist-runs"}
    assert not any(volume for pod in pods(job).values() for volume in pod.get("volumes", []) if "hostPath" in volume)


def test_the_job_is_what_is_submitted_elsewhere(job: dict[str, Any]) -> None:
    spec = job["spec"]
    python, script, images, option, run = spec["entrypoint"].split()
    assert (python, images, option) == ("python", "/images", "-o")
    assert run.startswith("/runs/")
    assert ROOT / "jobs" / Path(script).name in SCRIPTS
    assert f"COPY jobs/*.py {Path(script).parent}/" in (ROOT / "jobs" / "Dockerfile").read_text()
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": load("jobs/runtime_env.yaml")["env_vars"]}
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == 0


def test_one_version_of_ray_everywhere(job: dict[str, Any]) -> None:
    version = ray.__version__
    files = {
        path.relative_to(ROOT): path.read_text()
        for path in [
            ROOT / "pyproject.toml",
            ROOT / "constraints.txt",
            ROOT / "cluster.yaml",
            *(ROOT / "jobs").iterdir(),
        ]
        if path.is_file()
    }
    named = {
        str(path): set(re.findall(r"\bray(?:\[\w+\])?==([\w.]+)|\bray:(\d[\w.]*)|\brayVersion: ([\w.]+)", text))
        for path, text in files.items()
    }
    said = {path: {version for groups in found for version in groups if version} for path, found in named.items()}
    assert {path: found for path, found in said.items() if found - {version}} == {}
    for path in ("pyproject.toml", "constraints.txt", "cluster.yaml", "jobs/Dockerfile", "jobs/scan.rayjob.yaml"):
        assert said[path] == {version}, path
    images = {container["image"] for container in containers(job) if "image" in container}
    assert images == {f"ksmdist-ray:{version}-py311"}
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version
    base = f"rayproject/ray:{version}-py311"
    assert load("cluster.yaml")["docker"]["image"] == base
    assert f"FROM {base}\n" in files[Path("jobs/Dockerfile")]
    assert f"-t {images.pop()} " in files[Path("jobs/README.md")]


# The Ray Jobs route


@dataclass(frozen=True)
class Here:
    """A cluster on this machine, with a token and a dashboard."""

    gcs: str
    dashboard: str
    environment: Mapping[str, str]  # of who may join it
    folder: Path

    def submit(self, name: str, *entrypoint: object) -> subprocess.Popen[str]:
        """As jobs/README.md has it."""
        command = ["ray", "job", "submit", "--address", self.dashboard, "--submission-id", name, "--log-color", "false"]
        command += ["--working-dir", "jobs", "--runtime-env", "jobs/runtime_env.yaml", "--", *map(str, entrypoint)]
        return subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=ROOT,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def job(self, name: str, token: str | None = None) -> Any:
        """What the Jobs API says of a job."""
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{name}")
        request.add_header("Authorization", f"Bearer {token or self.environment['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    folder = Path(tempfile.mkdtemp(prefix="kj"))  # short: the paths of sockets have 107 bytes
    gcs, dashboard, agent, client, metrics = free_ports(5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    start = ["ray", "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", f"--temp-dir={folder}/ray"]
    start += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    start += [f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"]
    start += ["--node-ip-address=127.0.0.1", f"--object-store-memory={80 << 20}"]
    log = folder / "start.log"
    with open(log, "w") as sink:
        head = subprocess.Popen(
            [str(BIN / start[0]), *start[1:]],
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield Here(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment, folder)
    finally:
        head.terminate()  # with --block it stops what it has started, and no other cluster
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def listeners(port: int) -> set[str]:
    """Addresses that a port is listened on, as the kernel writes them."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_jobs_are_submitted_followed_and_end_with_their_codes(here: Here, make_raw: MakeImage, tmp_path: Path) -> None:
    sources = [make_raw("a.raw", [ZERO, page(1), None, page(2)]), make_raw("b.raw", [page(1), page(3), ZERO])]
    (tmp_path / "torn.elf").write_bytes(elf_core([(0, page(1) + page(2), 2 * PAGE)])[:-PAGE])
    (tmp_path / "letter.txt").write_text("no memory image")
    runs = tmp_path / "runs"
    runs.mkdir()
    jobs = {
        "whole": here.submit("whole", "python", "scan.py", *sources, "-o", runs / "whole"),
        "torn": here.submit("torn", "python", "scan.py", tmp_path / "torn.elf", "-o", runs / "torn"),
        "none": here.submit("none", "python", "scan.py", tmp_path / "letter.txt", "--format", "elf", "-o", runs / "no"),
        "plan": here.submit("plan", "python", "plan.py", *sources, "--json"),
    }
    logs = {name: submitted.communicate(timeout=120)[0] for name, submitted in jobs.items()}
    codes = {name: submitted.returncode for name, submitted in jobs.items()}
    assert codes == {"whole": 0, "torn": 1, "none": 1, "plan": 0}, logs

    for stage in ("scan: ", "merge: ", "count: ", f"run directory: {runs / 'whole'}", "Job 'whole' succeeded"):
        assert stage in logs["whole"]
    assert manifest(runs / "whole")["engine"]["name"] == "ray"
    ksmdist.run([str(source) for source in sources], runs / "inline", engine="inline")
    assert table_files(runs / "whole") == table_files(runs / "inline")

    assert "INCOMPLETE: 1 pages in 1 ranges" in logs["torn"]
    assert "failed with exit code 3" in logs["torn"]
    assert (runs / "torn" / "holes.parquet").exists()
    assert "does not start like elf" in logs["none"]
    assert "failed with exit code 10" in logs["none"]
    assert '"engine": "ray"' in logs["plan"]
    assert {path.name for path in runs.iterdir()} == {"whole", "inline", "torn"}

    told = {name: here.job(name) for name in jobs}
    assert {name: (job["status"], job["driver_exit_code"]) for name, job in told.items()} == {
        "whole": ("SUCCEEDED", 0),
        "torn": ("FAILED", 3),
        "none": ("FAILED", 10),
        "plan": ("SUCCEEDED", 0),
    }
    travelled = here.folder.glob("ray/session_latest/runtime_resources/working_dir_files/*/*")
    assert {path.name for path in travelled} == {script.name for script in SCRIPTS}


@pytest.mark.ray
@pytest.mark.slow
def test_the_dashboard_is_on_loopback_and_asks_for_the_token(here: Here) -> None:
    assert listeners(int(here.dashboard.rpartition(":")[2])) == {"0100007F"}
    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(here.dashboard + path, timeout=30)
        assert refused.value.code == 401
        refused.value.close()
    with pytest.raises(urllib.error.HTTPError) as refused:
        here.job("whole", secrets.token_hex(32))
    assert refused.value.code == 403
    refused.value.close()


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_is_joined_by_its_address(
    here: Here, make_raw: MakeImage, tmp_path: Path
) -> None:
    image = make_raw("a.raw", [ZERO] * 3)
    clean = {name: value for name, value in here.environment.items() if name != "RAY_AUTH_MODE"}
    clean["RAY_ADDRESS"] = here.gcs

    def run(name: str, *options: str, token: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(BIN / "ksmdist"), "run", str(image), "-o", str(tmp_path / name), *options],
            env=clean | {"RAY_AUTH_TOKEN": token},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    right = run("run", "--json", token=clean["RAY_AUTH_TOKEN"])
    wrong = run("other", token=secrets.token_hex(32))
    out, err = right.communicate(timeout=120)
    assert right.returncode == 0, err
    assert '"engine": "ray"' in out
    _, err = wrong.communicate(timeout=120)
    assert wrong.returncode == 1
    assert "RAY_AUTH_MODE and the token" in err
    assert not (tmp_path / "other").exists()
