"""Our classes become subclasses of transformers' ones when it is loaded, before or after our instances are made."""

import sys
import types

import pytest

from igpt_fast import kin


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("transformers.of_a_test")
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_class_gets_its_kin_once_it_is_there(other: types.ModuleType) -> None:
    @kin.stands_for("transformers.of_a_test", "Theirs")
    class Ours(kin.Root):
        shared = "ours"

    instance = Ours()
    kin.meet()
    assert Ours.__bases__ == (kin.Root,)

    class Theirs:
        shared = "theirs"
        more = "theirs"

    other.Theirs = Theirs  # type: ignore[attr-defined]
    kin.meet()
    kin.meet()
    assert Ours.__bases__ == (kin.Root, Theirs)
    assert isinstance(instance, Theirs)
    assert (instance.shared, instance.more) == ("ours", "theirs")


def test_a_base_that_they_share_gives_way(other: types.ModuleType) -> None:
    class Module(kin.Root):
        pass

    class Theirs(Module):
        pass

    @kin.stands_for("transformers.of_a_test", "Theirs")
    class Ours(Module):
        pass

    other.Theirs = Theirs  # type: ignore[attr-defined]
    kin.meet()
    assert Ours.__bases__ == (Theirs,)
