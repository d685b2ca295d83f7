"""torchquant doctor: what is there, what is not, and what to do about it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from torchquant.cli import doctor
from torchquant.cli.main import app
from torchquant.errors import LoweringError


def checks(diagnosis):
    return {check.what: check for part in diagnosis.parts.values() for check in part}


def test_here_all_that_is_needed_is_there():
    found = doctor.diagnose()
    assert found.is_right
    assert checks(found)["torch"].is_right
    assert checks(found)["C++ compiler"].is_right


def test_it_builds_nothing(monkeypatch):
    monkeypatch.setattr(doctor.native, "load", lambda: pytest.fail("built"))
    doctor.diagnose()


@pytest.mark.parametrize(
    ("present", "remedy"),
    [(None, "pip install 'torchao<0.19,>=0.18'"), ("0.9", "pip install 'torchao<0.19,>=0.18'"), ("0.18.3", "")],
)
def test_a_package_that_is_missing_or_of_another_version_is_named_with_the_command(monkeypatch, present, remedy):
    monkeypatch.setattr(doctor, "requires", lambda name: ["torchao>=0.18,<0.19"])
    monkeypatch.setattr(doctor, "_version", lambda name: present if name == "torchao" else "1")
    found = doctor.diagnose()
    assert found.is_right == (not remedy)
    assert checks(found)["torchao"].remedy == remedy


def test_without_a_compiler_lowering_for_x86_is_what_does_not_work(monkeypatch):
    def none():
        raise LoweringError("there is no C++ compiler")

    monkeypatch.setattr(doctor.builds, "compiler", none)
    check = checks(doctor.diagnose())["C++ compiler"]
    assert check.is_right is False
    assert "g++" in check.remedy


@pytest.mark.parametrize(
    ("flags", "is_right", "words"),
    [
        ({"avx2", "avx512_vnni"}, True, ""),
        ({"avx2"}, True, "without VNNI"),
        ({"sse4_2"}, False, "portable code"),
        (set(), True, ""),
    ],
)
def test_of_the_cpu_it_says_what_that_means_for_speed(monkeypatch, flags, is_right, words):
    monkeypatch.setattr(doctor.cpu, "instructions", lambda: frozenset(flags))
    monkeypatch.setattr(doctor.native, "supported", lambda: True)
    check = checks(doctor.diagnose())["CPU"]
    assert check.is_right is is_right
    assert words in check.remedy


def test_a_cache_that_cannot_be_written_and_a_full_disk_are_told(monkeypatch):
    monkeypatch.setattr(doctor.builds, "cache_folder", doctor.builds.own_folder)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e6))
    found = checks(doctor.diagnose())
    assert "TORCHQUANT_CACHE" in found["cache"].remedy
    assert found["room there"].is_right is False


def test_an_optional_part_says_what_it_gives_what_is_missing_and_the_extra(monkeypatch):
    wanted = ["torch>=2", 'executorch<1.6,>=1.5; extra == "executorch"', 'gguf>=0.19; extra == "llm"']
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor, "_version", {"torch": "2.13", "executorch": "1.4"}.get)
    found = {what: check for what, check in checks(doctor.diagnose()).items() if what.startswith("[")}
    mobile = next(check for what, check in found.items() if "executorch" in what)
    assert "1.4 instead of <1.6,>=1.5" in mobile.found
    assert mobile.remedy == "pip install 'torchquant[executorch]'"
    assert "gguf is missing" in next(check for what, check in found.items() if "llm" in what).found
    assert doctor.diagnose().is_right  # none of it is needed


def test_each_extra_that_users_install_is_told():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    listed = project.split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
    extras = set(re.findall(r"^([a-z]+) = \[", listed, re.MULTILINE))
    assert set(doctor._EXTRAS) == extras - {"demo", "test", "dev", "bench"}


def test_the_command_prints_it_for_people_and_for_programs(monkeypatch):
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)) == {"needed", "x86 programs", "NVIDIA GPUs", "optional"}
    assert "C++ compiler" in CliRunner().invoke(app, ["doctor"]).stdout
    monkeypatch.setattr(doctor, "_requirements", lambda extra: [Requirement("not-there")])
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 2
