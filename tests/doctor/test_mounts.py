"""What a container of Docker's sees of a job's files."""

from pathlib import Path

import pytest

from nemo_cpt.corpus import Blend
from nemo_cpt.doctor import Examination, Job, Place
from nemo_cpt.doctor.mounts import mounts, with_files
from nemo_cpt.executors.docker import volumes_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to launch from, with a base and a dataset in it, and others beside it."""
    for folder in (tmp_path / "here", tmp_path / "beside"):
        (folder / "base").mkdir(parents=True)
        (folder / "ja_text_document.idx").touch()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def job(volumes, base="base", data="ja", directory="results"):
    place = Place("docker", same_files=False, image="i", volumes=tuple(volumes_of(volumes)))
    return Job("tiny", place, base=str(base), data=Blend(train={str(data): 1.0}), directory=Path(directory, "run"))


def said(given):
    finding = mounts(Examination(given))
    return finding.found if finding.state == "error" else ""


def test_what_lies_in_the_current_folder_is_there_and_looked_at(here):
    for paths in ({}, {"base": here / "base", "data": here / "ja", "directory": here / "results"}):
        given = job(None, **paths)
        assert not said(given)
        assert with_files(given).place.same_files


def test_what_is_beside_it_is_missed_unless_it_is_mounted(here):
    beside = here.parent / "beside"
    for paths, name in (({"base": beside / "base"}, "base"), ({"data": beside / "ja"}, "data")):
        assert f"{name} {beside}" in said(job(None, **paths))
        assert not said(job([f"{beside}:{beside}:ro"], **paths))
        assert with_files(job([f"{beside}:{beside}:ro"], **paths)).place.same_files
    assert "base ../beside/base is in none" in said(job(None, base="../beside/base"))
    assert not with_files(job([f"{beside}:/data"], base="/data/base")).place.same_files
    assert not said(job([f"{beside}:/data"], base="/data/base"))
    assert not said(job(None, base="/opt/of-the-image/base"))


def test_results_that_would_go_with_the_container_are_refused(here):
    beside = here.parent / "beside"
    assert f"{beside}/run, where the run writes, would be gone" in said(job(None, directory=beside))
    assert "is mounted to be read alone" in said(job([f"{beside}:{beside}:ro"], directory=beside))
    assert not said(job([f"{beside}:{beside}"], directory=beside))


def test_nemo_runs_own_executor_keeps_what_is_written_to_the_jobs_folder(here):
    for directory, kept in (("results", True), ("/nemo_run/results", True), ("/data/results", False)):
        place = Place("docker", same_files=False, image="i", volumes=("/data",))
        given = Job("tiny", place, base="/opt/of-the-image/base", directory=Path(directory, "run"))
        assert ("would be gone" not in said(given)) is kept


def test_a_link_out_of_the_container_leads_nowhere(here):
    beside = here.parent / "beside"
    (here / "results").symlink_to(beside)
    assert f"results results/run is a link to {beside}/run" in said(job(None))
    assert not with_files(job(None)).place.same_files
    assert not said(job([f"{beside}:{beside}", f"{here}:{here}"]))


def test_no_container_has_no_mounts():
    assert mounts(Examination(Job("tiny", Place("slurm")))).state == "skipped"
