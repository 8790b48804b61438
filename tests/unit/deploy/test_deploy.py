"""Files of deploy/, held against the tools and schemas of those that read them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import compose
import jsonschema
import kubernetes_validate
import pytest
import yaml

from dam_vllm.options import MASKS_VARIABLE

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
IMAGES = [DEPLOY / name / "Dockerfile" for name in ("cpu", "cuda")]
COMPOSE = [DEPLOY / "compose.yaml", DEPLOY / "compose.cuda.yaml"]
MANIFESTS = [DEPLOY / "kubernetes" / f"{name}.yaml" for name in ("settings", "calibrate", "serve")]
USER = 10001


def instructions(file):
    """Instructions of a Dockerfile and their arguments, lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", file.read_text()).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]


def documents(*files):
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.parent.name)
def test_images_pass_the_linter(file):
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.parent.name)
def test_images_serve_as_nobody_and_tell_their_health(file):
    last = dict(instructions(file))
    assert last["USER"] == str(USER)
    assert "/health" in last["HEALTHCHECK"]
    assert json.loads(last["ENTRYPOINT"]) == ["vllm", "serve"]
    assert last["EXPOSE"] == "8000"


def test_what_images_copy_is_sent_to_the_builder():
    sent = re.findall(r"(?m)^!(.+)$", (ROOT / ".dockerignore").read_text())
    for file in IMAGES:
        for name, argument in instructions(file):
            if name == "COPY" and "--from" not in argument:
                for source in argument.split()[:-1]:
                    assert (ROOT / source).exists()
                    assert source in sent, source


def test_compose_files_follow_the_schema():
    schema = json.loads((Path(compose.__file__).parent / "config/compose_spec.json").read_text())
    for content in documents(*COMPOSE):
        jsonschema.Draft201909Validator(schema).validate(content)
        for service in content["services"].values():
            if "build" in service:
                assert (
                    DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]
                ).is_file()
            for volume in service.get("volumes", ()):
                source = volume.split(":")[0]
                assert source in content["volumes"] or (DEPLOY / source).is_dir()


def test_compose_serves_the_packaged_model_by_default():
    command = yaml.safe_load(COMPOSE[0].read_text())["services"]["vllm"]["command"]
    default = re.search(r"site-packages/([^}]+)\}", command[0])[1]
    assert (ROOT / default / "dam/masks.safetensors").is_file()


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_manifests_follow_kubernetes_schemas(file):
    for document in documents(file):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_manifests_fit_together():
    found = {(each["kind"], each["metadata"]["name"]): each for each in documents(*MANIFESTS)}
    assert len(found) == 5
    assert MASKS_VARIABLE in found["ConfigMap", "dam-vllm"]["data"]
    served = found["Deployment", "dam-vllm"]["spec"]
    labels = served["template"]["metadata"]["labels"]
    assert served["selector"]["matchLabels"] == labels
    assert found["Service", "dam-vllm"]["spec"]["selector"] == labels
    calibrated = found["Job", "dam-vllm-calibrate"]["spec"]["template"]
    assert calibrated["metadata"]["labels"] != labels
    for pod in (served["template"]["spec"], calibrated["spec"]):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsUser"] == USER
        assert container["securityContext"]["readOnlyRootFilesystem"]
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert {each["name"] for each in container["volumeMounts"]} == volumes.keys()
        claim = volumes["data"]["persistentVolumeClaim"]["claimName"]
        assert ("PersistentVolumeClaim", claim) in found
        assert ("ConfigMap", container["envFrom"][0]["configMapRef"]["name"]) in found
        given = found["ConfigMap", "dam-vllm"]["data"].keys()
        used = re.findall(r"\$\((\w+)\)", str(container))
        assert used
        assert set(used) <= given
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        (container,) = served["template"]["spec"]["containers"]
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}


def test_the_jobs_command_is_ours():
    """Options exist, and the settings that it names are in the image."""
    from typer.main import get_command

    from dam_vllm.cli.main import app

    job = next(each for each in documents(*MANIFESTS) if each["kind"] == "Job")
    program, command, *rest = job["spec"]["template"]["spec"]["containers"][0]["command"]
    options = {name for each in get_command(app).commands[command].params for name in each.opts}
    given = dict(each.split("=") for each in rest if each.startswith("--"))
    assert program == "dam-vllm"
    assert given.keys() <= options
    image = dict(
        argument.split() for name, argument in instructions(IMAGES[1])
        if name == "COPY" and len(argument.split()) == 2
    )  # fmt: skip
    folder, _, file = given["--config"].rpartition("/")
    assert image["configs"] == folder
    assert (ROOT / "configs" / file).is_file()


def test_the_production_stack_serves_with_dam():
    (values,) = documents(DEPLOY / "kubernetes/production-stack.yaml")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    assert model["vllmConfig"]["extraArgs"] == ["--attention-backend=dam"]
    assert [each["name"] for each in model["env"]] == [MASKS_VARIABLE, "VLLM_PLUGINS"]
    assert values["servingEngineSpec"]["securityContext"]["runAsUser"] == USER
    assert "lmcacheConfig" not in model
