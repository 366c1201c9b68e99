"""Manifests agree with the published schemas, hold no secret, and are not written after a mistake."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from limbeck.cli import main
from limbeck.config import load_arguments, load_config
from limbeck.deploy import hyperpod

REPOSITORY = Path(__file__).parents[2]
CRDS = REPOSITORY.parent / "shared" / "references" / "crds"
TEMPLATE = REPOSITORY / "kubernetes" / "distill.yaml-template"
FILES = {
    "PyTorchJob": "kubeflow.org_pytorchjobs.yaml",
    "TrainJob": "trainer.kubeflow.org_trainjobs.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
}
KINDS = ("pytorchjob", "trainjob", "rayjob")
WALKTHROUGH = {
    "IMAGE_URI": "123.dkr.ecr.us-west-2.amazonaws.com/distill:pytorch2.7.1", "INSTANCE_TYPE": "ml.p5en.48xlarge",
    "NUM_NODES": "2", "GPU_PER_NODE": "8", "EFA_PER_NODE": "16", "TOTAL_PROCESSES": "16", "FI_PROVIDER": "efa",
    "HF_TOKEN": "hf_readable", "SAVE_LOCATION": "both", "HUB_LOCATION": "me/student", "NUM_SAMPLES": "100",
    "TEACHER_MODEL": "arcee-ai/Arcee-Spark", "STUDENT_MODEL": "Qwen/Qwen2-1.5B", "NUM_EPOCHS": "3", "OUTPUT_DIR": "/fsx",
}  # fmt: skip


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "student_pretrain: models/student  # relative to the volume\nteacher_pretrain: models/teacher\n"
        "output_dir: output/first\nstudent:\n  data_args: {file_name: data/train.jsonl}\n"
    )
    return path


@pytest.fixture
def deploy(config, capsys):
    """``deploy(*arguments)`` → exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["deploy", "kubernetes", str(config), *arguments])
        return status, *capsys.readouterr()

    return run


REQUIRED = ("--image", "registry/distill:1", "--pvc", "fsx-claim")
EVERYTHING = (
    *REQUIRED, "--nodes", "2", "--efa-per-node", "16", "--shm-size", "64Gi", "--instance-type", "ml.p5en.48xlarge",
    "--node-selector", "zone=a", "--annotation", "owner=me", "--namespace", "team", "--name", "first", "seed=7",
)  # fmt: skip


def closed(schema):
    """A schema that rejects the fields which a cluster would silently drop."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


@cache
def validator(kind: str, version: str):
    jsonschema = pytest.importorskip("jsonschema")
    if not CRDS.is_dir():
        pytest.skip(f"the schemas of the operators are not in {CRDS}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = yaml.load((CRDS / FILES[kind]).read_text(), Loader=loader)
    assert found["spec"]["group"] == version.split("/")[0]
    versions = {one["name"]: one["schema"]["openAPIV3Schema"] for one in found["spec"]["versions"]}
    schema = closed(versions[version.split("/")[1]])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def assert_valid(manifest: dict) -> None:
    errors = validator(manifest["kind"], manifest["apiVersion"]).iter_errors(manifest)
    assert not [f"{error.json_path}: {error.message[:200]}" for error in errors]


def pods(manifest: dict) -> list[dict]:
    """The specifications of all pods in a job."""
    found = []

    def visit(value):
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            visit(inner)
        if isinstance(value, dict) and "containers" in value:
            found.append(value)

    visit(manifest)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [EVERYTHING, (*REQUIRED, "--nodes", "2")], ids=["all flags", "few flags"])
def test_manifests_have_only_fields_of_the_published_schemas(deploy, kind, arguments):
    status, text, _ = deploy(*arguments, "--kind", kind)
    assert status == 0
    config_map, job = yaml.safe_load_all(text)
    assert config_map["metadata"]["name"] == job["metadata"]["name"]
    assert_valid(job)


def test_an_unknown_field_is_not_valid(deploy):
    job = list(yaml.safe_load_all(deploy(*REQUIRED)[1]))[1]
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["nodeSelektor"] = {}
    with pytest.raises(AssertionError, match="nodeSelektor"):
        assert_valid(job)


def test_core_objects_are_valid(deploy):
    validate = pytest.importorskip("kubernetes_validate").validate
    config_map, job = yaml.safe_load_all(deploy(*EVERYTHING)[1])
    validate(config_map, "1.33", strict=True)
    ray = list(yaml.safe_load_all(deploy(*EVERYTHING, "--kind", "rayjob")[1]))[1]
    for pod in pods(job) + pods(ray):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod}, "1.33", strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_pods_have_the_devices_volumes_nodes_and_secrets_but_no_privileges(deploy, kind):
    job = list(yaml.safe_load_all(deploy(*EVERYTHING, "--kind", kind)[1]))[1]
    for pod in pods(job):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["storage"]["persistentVolumeClaim"]["claimName"] == "fsx-claim"
        assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
        assert not any("hostPath" in volume for volume in pod["volumes"])
        assert pod["securityContext"]["runAsNonRoot"] and pod["terminationGracePeriodSeconds"] == 600
        assert pod["nodeSelector"]["zone"] == "a"
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    worker = pods(job)[-1]
    assert worker["nodeSelector"]["node.kubernetes.io/instance-type"] == "ml.p5en.48xlarge"
    container = worker["containers"][0] if kind != "trainjob" else job["spec"]["trainer"]
    limits = container.get("resources", container.get("resourcesPerNode"))["limits"]
    assert limits == {"nvidia.com/gpu": 8, "vpc.amazonaws.com/efa": 16}
    environment = {one["name"]: one for one in container["env"]}
    assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "hf-token"
    assert environment["FI_PROVIDER"]["value"] == "efa"
    if kind != "rayjob":  # torchrun kills processes that still save when this time is over, and Kubernetes torchrun
        assert int(environment["PET_SHUTDOWN_TIMEOUT"]["value"]) == pods(job)[0]["terminationGracePeriodSeconds"] - 10


def test_the_configuration_in_the_manifest_is_the_file(deploy, config, tmp_path):
    text = deploy(*REQUIRED, "max_steps=5")[1]
    config_map, job = yaml.safe_load_all(text)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_map["data"]["config.yaml"])
    assert copy.read_text() == config.read_text()
    command = pods(job)[0]["containers"][0]["command"]
    loaded = load_config(copy, command[command.index("/etc/limbeck/config.yaml") + 1 :]).config
    assert (loaded.max_steps, loaded.resume_from_checkpoint) == (5, "latest")


def test_a_ray_job_has_one_rank_per_device_of_all_nodes(deploy, config):
    job = list(yaml.safe_load_all(deploy(*REQUIRED, "--nodes", "2", "--kind", "rayjob")[1]))[1]
    arguments = job["spec"]["entrypoint"].split()
    assert arguments[:3] == ["limbeck", "train", "/etc/limbeck/config.yaml"]
    loaded = load_config(config, arguments[3:]).config
    assert loaded.student.device_mapping == list(range(16))
    assert (loaded.num_nodes, loaded.num_gpus_per_node) == (2, 8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--image", "i"), "--pvc is missing; give the PersistentVolumeClaim"),
        (("--pvc", "p"), "--image is missing; give the name of an image"),
        (("--image", "i", "--pvc", ""), "--pvc '' is not a name that Kubernetes accepts"),
        ((*REQUIRED, "--nodes", "two"), "--nodes two is not a number"),
        ((*REQUIRED, "--gpus-per-node", "0"), "--gpus-per-node 0 is too small"),
        ((*REQUIRED, "--efa-per-node", "-1"), "--efa-per-node -1 is too small"),
        ((*REQUIRED, "--grace-period", "5"), "--grace-period 5 is too small"),
        ((*REQUIRED, "--user", "0"), "--user 0 is too small"),
        ((*REQUIRED, "--shm-size", "big"), "--shm-size big is not a size"),
        ((*REQUIRED, "--name", "Distill"), "--name Distill is not a name"),
        ((*REQUIRED, "--mount-path", "fsx"), "--mount-path fsx is not an absolute path"),
        ((*REQUIRED, "--node-selector", "zone"), "--node-selector zone is not a pair"),
        ((*REQUIRED, "--node-selector", "a b=c"), "'a b' is not a key of a label"),
        ((*REQUIRED, "--annotation", "a b=c"), "'a b' is not a key of a label"),
        ((*REQUIRED, "--namespace", "a.b"), "--namespace a.b is not a name"),
        ((*REQUIRED, "--kind", "job"), "--kind job is not a kind of job; use one of pytorchjob, trainjob, rayjob."),
        ((*REQUIRED, "--kind", "rayjob"), "needs no Ray; use --kind pytorchjob"),
        ((*REQUIRED, "kd_temprature=2"), "kd_temprature is not a key; did you mean kd_temperature?"),
        ((*REQUIRED, "output_dir=/tmp/out"), "output_dir = /tmp/out is not on the volume"),
        ((*REQUIRED, "resume_from_checkpoint=a/checkpoint-5"), "would be used again after every restart"),
        ((*REQUIRED, "student.device_mapping=[0,1]"), "names 2 devices, but the job has --nodes 1 x --gpus-per-node 8"),
        ((*REQUIRED, "student.device_mapping=[0]", "teacher.device_mapping=[1]"), "use --kind rayjob"),
        ((*REQUIRED, "system_envs={WANDB_API_KEY: abc}"), "system_envs.WANDB_API_KEY may be a secret"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_nothing_is_written(deploy, tmp_path, arguments, sentence):
    before = set(tmp_path.iterdir())
    status, output, error = deploy(*arguments, "--output", str(tmp_path / "job.yaml"))
    assert status == 2
    assert sentence in error and error.count("\n") == 1
    assert not output and set(tmp_path.iterdir()) == before


def test_a_file_with_defaults_is_not_enough_for_a_manifest(deploy, config):
    config.with_name("base.yaml").write_text("seed: 3\n")
    config.write_text("defaults: [base, _self_]\n" + config.read_text())
    status, _, error = deploy(*REQUIRED)
    assert status == 2 and "write one file with `limbeck config" in error


def test_a_list_of_layers_in_another_file_is_not_in_the_manifest(deploy, config):
    config.with_name("layers.yaml").write_text("unfrozen_parameters: [lm_head]\n")
    values = yaml.safe_load(config.read_text())
    values["student"].setdefault("model_args", {})["unfrozen_parameters"] = str(config.with_name("layers.yaml"))
    config.write_text(yaml.safe_dump(values))
    status, _, error = deploy(*REQUIRED)
    assert status == 2 and "write the list of that file there instead" in error


def test_the_output_is_never_the_configuration_itself(deploy, config):
    before = config.read_text()
    status, _, error = deploy(*REQUIRED, "--output", str(config))
    assert status == 2 and "is the configuration itself" in error
    assert config.read_text() == before
    assert deploy(*REQUIRED, "--output", str(config.parent / "no" / "job.yaml"))[0] == 2
    assert deploy(*REQUIRED, "--output", str(config.parent / "job.yaml"))[0] == 0
    assert (config.parent / "job.yaml").read_text() == deploy(*REQUIRED)[1]


def test_the_template_is_what_the_generator_writes():
    assert TEMPLATE.read_text(encoding="utf-8") == hyperpod.template()


def test_the_template_becomes_a_valid_job_with_the_variables_of_the_walkthrough():
    """Substitutes as GNU envsubst does, every ``$NAME`` and ``${NAME}``."""
    text = TEMPLATE.read_text(encoding="utf-8")
    substituted = subprocess.run(
        [sys.executable, "-c", "import os, sys; print(os.path.expandvars(sys.stdin.read()))"],
        input=text, env={**os.environ, **WALKTHROUGH}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "$" not in substituted and WALKTHROUGH["HF_TOKEN"] not in substituted
    job = yaml.safe_load(substituted)
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    command = worker["template"]["spec"]["containers"][0]["command"]
    assert worker["replicas"] == 2 and job["metadata"]["name"] == "distill"
    assert "--nproc-per-node=8" in command
    loaded = load_arguments(command[command.index(hyperpod.SCRIPT) + 1 :], "hyperpod").config
    assert loaded.checkpoint_config.save_to_hub.repo_id == "me/student"
    assert (loaded.output_dir, loaded.resume_from_checkpoint) == ("/fsx", "latest")
    per_step = loaded.student.training_args.gradient_accumulation_steps * int(WALKTHROUGH["TOTAL_PROCESSES"])
    assert per_step <= int(WALKTHROUGH["NUM_SAMPLES"])  # else the walkthrough has no step
    assert_valid(job)


def test_the_image_has_the_files_that_it_names():
    dockerfile = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY ") and "--from" not in line
    ]
    names = [name for sources in copied for name in sources]
    assert names and not [name for name in names if not (REPOSITORY / name).exists()]
    script = names[names.index("src/distil_logits_cli.py")]
    assert f"/distillation/{Path(script).name}" == hyperpod.SCRIPT
    folders = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    if (hadolint := shutil.which("hadolint", path=folders)) is not None:
        done = subprocess.run([hadolint, str(REPOSITORY / "Dockerfile")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_script_of_the_image_reads_the_flags_of_the_sample(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distil_logits_cli.py", "--alhpa", "0.5"])
    assert runpy.run_path(str(REPOSITORY / "src" / "distil_logits_cli.py"))["main"]() == 2
    assert "--alhpa is not a flag, did you mean --alpha?" in capsys.readouterr().err
