"""States on disk: whole or absent, whenever the run is killed, and nobody else's files touched."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from finetune.training.states import (
    STATE,
    DamagedState,
    load_state,
    newest_state,
    remove_states,
    save_state,
    saved_states,
    set_aside,
)
from sdkit.errors import CheckpointError
from tests.finetune.toy import Killed


def export(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_text("weights")


def test_the_last_states_are_kept_in_the_order_of_steps(tmp_path: Path):
    for step in (2, 9, 10, 100):
        save_state(tmp_path, step, {"step": step, "x": torch.tensor([float(step)])}, keep=2, export=export)
    assert [p.name for p in saved_states(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    newest = saved_states(tmp_path)[-1]
    assert load_state(newest)["x"].tolist() == [100.0] and (newest / "adapter" / "weights").is_file()
    save_state(tmp_path, 100, {"step": "again"}, keep=2)
    assert load_state(newest) == {"step": "again"} and len(saved_states(tmp_path)) == 2
    assert [p.name for p in newest.iterdir()] == [STATE]  # nothing of the older one
    remove_states(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_clear_error_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_state(tmp_path, 1, {"step": 1}, keep=2)

    def stop(content: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("no space left")  # as torch does

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(CheckpointError, match=r"checkpoint-2: cannot be written \(no space left\)"):
        save_state(tmp_path, 2, {"step": 2}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert load_state(tmp_path / "checkpoint-1") == {"step": 1}


class Reaper:
    """Kills at one of the calls that change the disk, before it is done, and at all later ones until it is called off.

    Python reports each such call to its audit hooks. So nothing tidies up, as after SIGKILL.
    """

    CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree")

    def __init__(self) -> None:
        self.remaining = -1  # inert
        sys.addaudithook(self.hook)

    def hook(self, event: str, _: object) -> None:
        if self.remaining >= 0 and event in self.CALLS:
            self.remaining -= self.remaining > 0
            if self.remaining == 0:
                raise Killed

    def killed(self, moment: int, call: Callable[[], object]) -> bool:
        """Whether ``call`` has as many as ``moment`` calls, and so was killed."""
        self.remaining = moment
        try:
            call()
        except Killed:
            return True
        finally:
            self.remaining = -1
        return False


def test_killed_at_any_moment_there_is_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reaper, moments = Reaper(), 0
    while True:
        folder = tmp_path / str(moments)
        for step in (1, 2):
            save_state(folder, step, {"step": step}, keep=2, export=export)
        if not reaper.killed(moments + 1, partial(save_state, folder, 3, {"step": 3}, 2, export)):
            break
        check_and_go_on(folder)
        moments += 1
    assert moments >= 15

    def half(state: object, path: Path) -> None:
        path.write_bytes(b"half a sta")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", half)
        save_state(folder, 5, {"step": 5}, keep=2, export=export)
    assert [load_state(p)["step"] for p in saved_states(folder)] == [2, 3]


def check_and_go_on(folder: Path) -> None:
    """After a kill at step 3."""
    states = [load_state(p)["step"] for p in saved_states(folder)]
    assert states[-2:] in ([1, 2], [2, 3]), states
    assert all((p / "adapter" / "weights").is_file() for p in saved_states(folder))
    save_state(folder, 4, {"step": 4}, keep=2, export=export)
    assert len(saved_states(folder)) == 2 and len(list(folder.iterdir())) == 2


def test_killed_while_all_states_go_the_rest_goes_next_time(tmp_path: Path):
    reaper, moments = Reaper(), 0
    while True:
        for step in (1, 2):
            save_state(tmp_path, step, {"step": step}, keep=2, export=export)
        if not reaper.killed(moments + 1, lambda: remove_states(tmp_path)):
            break
        assert all(load_state(p)["step"] for p in saved_states(tmp_path))
        remove_states(tmp_path)
        assert list(tmp_path.iterdir()) == []
        moments += 1
    assert moments >= 6


def test_what_is_no_state_is_not_picked(tmp_path: Path):
    assert saved_states(tmp_path / "nowhere") == []
    for name in ("checkpoint-5.tmp", "checkpoint-x", ".checkpoint-7.old.tmp", "checkpoint-8"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert saved_states(tmp_path) == []


def test_only_what_is_ours_is_deleted(tmp_path: Path):
    """Others' temporary files, and the checkpoints of another program in the same folder, stay."""
    theirs = ["mine.tmp/file", "checkpoint-4.tmp/file", ".checkpoint-notes.tmp/file", "checkpoint-1/optimizer.bin"]
    ours = [".checkpoint-3.machine-17-23.tmp/half", ".checkpoint-2.old.tmp/state.pt"]
    for name in (*theirs, *ours):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "notes.tmp").write_text("x")
    (tmp_path / ".checkpoint-6.list.tmp").write_text("a file")
    (tmp_path / ".checkpoint-8.link.tmp").symlink_to(tmp_path / "mine.tmp")

    for step in (5, 6, 7):
        save_state(tmp_path, step, {"step": step}, keep=1)
    remove_states(tmp_path)

    assert all((tmp_path / name).read_text() == "x" for name in theirs)
    assert not any((tmp_path / name).parent.exists() for name in ours) and saved_states(tmp_path) == []
    others = {"notes.tmp", ".checkpoint-6.list.tmp", ".checkpoint-8.link.tmp"}
    assert {p.name for p in tmp_path.iterdir()} == {name.split("/")[0] for name in theirs} | others


def test_a_damaged_state_is_a_clear_error(tmp_path: Path):
    folder = save_state(tmp_path, 1, {"step": 1, "x": torch.zeros(1000)}, keep=2)
    whole = (folder / STATE).read_bytes()
    for content in (b"", b"nonsense", whole[:500]):
        (folder / STATE).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint-1.state\.pt: not a state of a training run"):
            load_state(folder)
    (folder / STATE).unlink()
    with pytest.raises(CheckpointError, match="not a state"):
        load_state(folder)
    torch.save([1, 2], folder / STATE)
    with pytest.raises(DamagedState, match=r"not a state of a training run .it holds a list"):
        load_state(folder)


def test_no_changed_bit_is_taken_for_what_was_written(tmp_path: Path):
    state = {"step": 1, "x": torch.arange(100.0), "facts": {"a": "b"}}
    folder = save_state(tmp_path, 1, state, keep=2)
    whole, found = (folder / STATE).read_bytes(), 0
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (folder / STATE).write_bytes(changed)
        try:
            again = load_state(folder)
        except DamagedState:
            found += 1
        else:  # a bit that says nothing, such as one between the members
            assert torch.equal(again.pop("x"), state["x"]) and again == {"step": 1, "facts": {"a": "b"}}
    assert found > len(whole) / 7 / 2


def test_the_newest_state_is_the_last_that_is_whole(tmp_path: Path):
    folders = [save_state(tmp_path, step, {"step": step}, keep=4) for step in (1, 2, 3, 4)]
    assert newest_state(folders) == (folders[3], {"step": 4}, [])
    for folder in folders[2:]:
        (folder / STATE).write_bytes(b"")
    newest, state, damaged = newest_state(folders)
    assert (newest, state) == (folders[1], {"step": 2})
    assert [str(error).split(":")[0] for error in damaged] == [str(f / STATE) for f in (folders[3], folders[2])]
    for folder in folders[:2]:
        (folder / STATE).write_bytes(b"PK")
    with pytest.raises(
        DamagedState, match=r"checkpoint-4.*checkpoint-1.*no other state is left, --no-resume begins anew"
    ):
        newest_state(folders)


def test_a_state_that_may_not_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_state(tmp_path, 1, {"step": 1}, keep=1)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("finetune.training.states.zipfile.ZipFile", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read .Permission denied: change its permissions") as caught:
        newest_state([folder])
    assert not isinstance(caught.value, DamagedState)


def test_what_is_set_aside_is_neither_counted_nor_replaced(tmp_path: Path):
    names: list[str] = []
    for content in ("a", "b", "c"):
        folder = save_state(tmp_path, 7, {"step": content}, keep=1)
        names.append(set_aside(folder).name)
    assert names == ["damaged-checkpoint-7", "damaged-checkpoint-7-1", "damaged-checkpoint-7-2"]
    remove_states(tmp_path)
    assert saved_states(tmp_path) == [] and [load_state(tmp_path / name)["step"] for name in names] == ["a", "b", "c"]
