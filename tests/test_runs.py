"""Run folders: identity, facts, finding, and the lock that tells the living from the dead."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medseg.files import UserError
from medseg.runs import (
    create_run,
    find_run,
    git_revision,
    hold_run,
    list_runs,
    machine_facts,
    new_run_id,
    read_run,
    update_run,
)

HOLDER = """
import sys, time
from pathlib import Path
from medseg.runs import find_run, hold_run
with hold_run(find_run(Path(sys.argv[1]), sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_ids_are_readable_unique_and_safe_as_folder_names() -> None:
    ids = {new_run_id("Hippo campus/../x") for _ in range(50)}
    assert len(ids) > 45  # four random digits
    assert all(re.fullmatch(r"\d{8}-\d{6}-hippo-campus-x-[0-9a-f]{4}", run_id) for run_id in ids)
    assert new_run_id("///").split("-")[2] == "run"


def test_run_json_says_what_runs_where_and_nothing_that_names_the_machine(tmp_path: Path) -> None:
    run = create_run(tmp_path, "hippocampus", seed=7, step="train")
    about = read_run(run)
    assert run.path == tmp_path / "runs" / run.id
    assert (about["id"], about["status"], about["seed"], about["step"]) == (run.id, "CREATED", 7, "train")
    assert about["machine"]["cores"] >= 1
    assert about["machine"]["memory_gb"] > 0
    assert about["packages"]["medseg"]
    assert about["created"].endswith("+00:00")
    assert os.uname().nodename not in json.dumps(about["machine"])
    assert "pid" not in about  # nobody works on it yet


def test_update_sets_and_removes_entries(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a", failure="once")
    update_run(run, status="FINISHED", failure=None, figures={"dice": 0.9})
    about = read_run(run)
    assert about["status"] == "FINISHED"
    assert about["figures"] == {"dice": 0.9}
    assert "failure" not in about
    assert about["id"] == run.id


def test_given_ids_are_kept_once_and_only_if_they_name_a_folder(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a", "flow-7f3a")
    assert run.id == "flow-7f3a"
    with pytest.raises(UserError, match="taken"):
        create_run(tmp_path, "a", "flow-7f3a")
    for bad in ("../outside", "", "a/b", ".hidden", "x" * 129):
        with pytest.raises(UserError, match="cannot name a folder"):
            create_run(tmp_path, "a", bad)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["flow-7f3a"]


def test_a_file_in_the_way_of_the_workspace_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workspace"):
        create_run(tmp_path / "file", "a")


def test_find_lists_the_nearest_ids(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run yet"):
        find_run(tmp_path, "x")
    run = create_run(tmp_path, "a", "20260101-000000-hippocampus-aaaa")
    create_run(tmp_path, "b", "20260202-000000-lungs-bbbb")
    assert find_run(tmp_path, run.id) == run
    assert [r.id for r in list_runs(tmp_path)] == ["20260202-000000-lungs-bbbb", run.id]
    with pytest.raises(UserError, match=r"nearest: 20260101-000000-hippocampus-aaaa"):
        find_run(tmp_path, "20260101-000000-hippocampus-aaab")
    with pytest.raises(UserError, match="is not in"):
        find_run(tmp_path / "runs", f"../runs/{run.id}")


def test_a_run_is_held_by_one_process_and_freed_by_its_sigkill(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), run.id], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="worked on by process"), hold_run(run, wait_s=0):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with hold_run(run, wait_s=2):
        pass
    holder.stdout.close()


def test_a_forked_child_does_not_keep_a_run_held(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a")
    read_end, write_end = os.pipe()
    with hold_run(run):
        child = os.fork()
        if child == 0:
            os.close(write_end)
            os.read(read_end, 1)  # lives on, with every file of its parent, until the test ends
            os._exit(0)
    with hold_run(run, wait_s=0):
        pass
    os.close(write_end)
    os.close(read_end)
    os.waitpid(child, 0)


def test_the_revision_is_a_commit_or_empty() -> None:
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", git_revision())
    assert machine_facts() == machine_facts()
