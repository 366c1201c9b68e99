"""An incomplete extension is refused where it is registered, in one sentence."""

import re

import pytest

from limbeck.config import load_mapping
from limbeck.config.dialects.base import Dialect
from limbeck.errors import LimbeckError
from limbeck.registry import DIALECTS, STRATEGIES, TEACHERS, check_members
from limbeck.strategies.base import Strategy


def a_strategy(*methods):
    return type("Mine", (), dict.fromkeys(methods, lambda self: None))


WHOLE = ("dims", "check", "check_model", "build_student")


def test_a_missing_method_is_named_with_the_strategy_and_its_class():
    sentence = "the strategy mine_train lacks check_model; define it in the class Mine."
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        STRATEGIES.register("mine_train")(a_strategy("dims", "check", "build_student")())
    assert "mine_train" not in STRATEGIES


@pytest.mark.parametrize(("name", "needed"), [("mine_train", "build_student"), ("mine_infer", "build_teacher")])
def test_a_strategy_builds_what_its_name_says(name, needed):
    STRATEGIES.register(name)(a_strategy("dims", "check", "check_model", needed)())
    with pytest.raises(LimbeckError, match=f"lacks {needed}; define it"):
        STRATEGIES.register(f"other_{name}")(a_strategy("dims", "check", "check_model")())


def test_a_class_in_place_of_an_object_is_refused():
    sentence = "the strategy mine_train is the class Mine; register an object of it."
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        STRATEGIES.register("mine_train")(a_strategy(*WHOLE))


def test_an_object_in_place_of_a_function_is_refused():
    with pytest.raises(LimbeckError, match="the teacher source mine is a Mine; register a function or a class"):
        TEACHERS.register("mine")(a_strategy(*WHOLE)())


def test_the_error_names_the_plugin_file_and_the_line_that_names_it(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("from limbeck.registry import DIALECTS\nDIALECTS.register('mine')(object())\n")
    sentence = f"{plugin}: the dialect mine lacks name, system, recognises, translate; define them in the class object."
    with pytest.raises(LimbeckError, match=re.escape(f"arguments: plugins: {sentence}")):
        load_mapping({"plugins": [str(plugin)]})


@pytest.mark.parametrize(
    ("registry", "name", "protocol"), [(STRATEGIES, "a_train", Strategy), (DIALECTS, "a", Dialect)]
)
def test_every_member_of_the_protocol_is_required_but_those_that_are_optional(registry, name, protocol):
    optional = {"simulate", "build_teacher"} if protocol is Strategy else set()
    members = {member for member in {**vars(protocol), **protocol.__annotations__} if not member.startswith("_")}
    assert set(registry._members(name)) == members - optional


def test_members_may_be_set_on_the_object_and_a_property_is_not_computed():
    class Mine:
        def __init__(self):
            self.name = "mine"

        @property
        def size(self):
            raise AttributeError("the size is not known yet")

    check_members("mine", Mine(), ("name", "size"))
