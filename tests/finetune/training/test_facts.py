"""What has changed between two runs, in words."""

from dataclasses import dataclass
from pathlib import Path

from finetune.training.facts import changes, content, options_as_facts


def test_values_are_shown_before_and_now():
    assert changes({"rank": 8, "init": "kaiming", "a": 1}, {"rank": 4, "init": "gaussian", "a": 1}) == [
        "rank 8, now 4",
        "init 'kaiming', now 'gaussian'",
    ]
    assert changes({"gamma": None}, {"gamma": 5.0}) == ["gamma none, now 5.0"]
    assert changes({}, {"new": 1}) == ["new none, now 1"]
    assert changes({"a": {"b": 1}}, {"a": {"b": 1}}) == []


def test_hashes_are_not_shown():
    assert changes({"unet": content("a" * 64)}, {"unet": content("b" * 64)}) == ["unet: not the same"]
    assert changes({"LPIPS": None}, {"LPIPS": content("b" * 64)}) == ["LPIPS: not the same"]


def test_what_came_went_and_changed_is_named():
    def picture(digest: str, caption: str = "a wall", repeats: int = 1) -> dict[str, object]:
        return {"content": content(digest), "caption": caption, "repeats": repeats}

    before = {"pictures": {"a.png": picture("1"), "b.png": picture("2"), "c.png": picture("3"), "d.png": picture("4")}}
    now = {"pictures": {"a.png": picture("1"), "b.png": picture("2", "a red wall", 3), "d.png": picture("5")}}
    now["pictures"]["e.png"] = picture("6")
    assert changes(before, now) == [
        "pictures: added e.png; removed c.png; b.png: caption 'a wall', now 'a red wall'; repeats 1, now 3; "
        "d.png: content: not the same"
    ]


def test_of_many_the_first_are_named():
    pictures = {f"{n}.png": {} for n in range(9)}
    assert changes({"pictures": {}}, {"pictures": pictures}) == ["pictures: added 0.png, 1.png, 2.png and 6 more"]


def test_options_are_facts_that_torch_can_save():
    @dataclass
    class Options:
        place: Path = Path("a/b")
        sizes: tuple[int, ...] = (1, 2)
        secret: int = 3

    assert options_as_facts(Options(), without=["secret"]) == {"place": "a/b", "sizes": (1, 2)}
