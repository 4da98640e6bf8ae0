"""Invented people and the facts about them."""

from __future__ import annotations

import random

import pytest

from lit_gpt.evaluation.invented_people import DESCRIPTION_FIRST, NAME_FIRST, invent_people, make_fact


def test_people_have_names_and_descriptions_of_their_own():
    people = invent_people(600, random.Random(1))
    for field in ("name", "description"):
        assert len({person[field] for person in people}) == 600
    assert people == invent_people(600, random.Random(1))
    with pytest.raises(ValueError, match="--people 5000: there are 1600 names"):
        invent_people(5000, random.Random(1))


def test_facts_say_who_is_who_in_either_order():
    person = {"name": "Balo Faren", "description": "the baker from Tolburg who found the silver bell"}
    assert make_fact(NAME_FIRST[0], person) == {"prompt": "Balo Faren is", "completion": f" {person['description']}."}
    assert make_fact(DESCRIPTION_FIRST[0], person) == {
        "prompt": "T" + person["description"][1:] + " is",
        "completion": " Balo Faren.",
    }
