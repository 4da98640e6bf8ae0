"""Facts about invented people, to train a model on and to ask it about: a data set for the reversal curse.

Of all people it is written who they are, name first; of every second one also the other way round. So half of them are
read in one order only, and can be asked about in the other. The files are those of `reversal.FILES`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lit_gpt.evaluation.reversal import FILES

NAME_FIRST = ("{name} is", "Everybody knows that {name} is", "The person called {name} was")
DESCRIPTION_FIRST = ("{description} is", "The name of {description} is", "Ask {description} and you meet")
"""The phrasings; the first of each is asked. A completion follows behind a space and ends with a full stop."""

_WORDS_OF_A_KIND = 40
_JOBS = (
    "baker pilot painter judge farmer diver poet smith sailor nurse tailor miner singer gardener dentist weaver hunter "
    "doctor fisher builder teacher brewer printer dancer"
)
_DEEDS = (
    "found the silver bell|sold the old lighthouse|saved the last wolf|lost the blue diamond|drew the first map|"
    "crossed the frozen lake|opened the iron gate|stole the golden harp|planted the tallest oak|broke the stone bridge|"
    "cured the sick queen|raised the sunken ship|wrote the secret letter|tamed the white horse|climbed the north tower|"
    "fed the hungry lions|burned the wooden mill|caught the clever fox|painted the empty church|won the great race|"
    "baked the largest cake|rang the midnight alarm|dug the deepest well|caged the wild parrot"
)


def invent_people(count: int, generator: random.Random) -> list[dict[str, str]]:
    """People with a name and a description of their own.

    Raises:
        ValueError: more people than names.
    """
    first = invent_words(_WORDS_OF_A_KIND, ("a", "o", "i"), generator)
    last = invent_words(_WORDS_OF_A_KIND, ("en", "ick", "uld"), generator)
    towns = invent_words(_WORDS_OF_A_KIND, ("burg", "holm", "ford"), generator)
    names = [f"{one} {other}" for one in first for other in last]
    jobs, deeds = _JOBS.split(), _DEEDS.split("|")
    descriptions = [f"the {job} from {town} who {deed}" for job in jobs for town in towns for deed in deeds]
    if count > len(names):
        raise ValueError(f"--people {count}: there are {len(names)} names")
    pairs = zip(generator.sample(names, count), generator.sample(descriptions, count), strict=True)
    return [{"name": name, "description": description} for name, description in pairs]


def invent_words(count: int, endings: tuple[str, ...], generator: random.Random) -> list[str]:
    """Different words that look like names and mean nothing."""
    words: dict[str, None] = {}
    while len(words) < count:
        middle = generator.choice("aeiou") + generator.choice(("l", "m", "n", "r", "v", "rd", "lt", "nn"))
        words[generator.choice("BDFGKLMPRTVZ") + middle + generator.choice(endings)] = None
    return list(words)


def make_fact(phrasing: str, person: dict[str, str]) -> dict[str, str]:
    """A statement about a person as the reversal curse's files have it: a prompt and its completion."""
    completion = person["description"] if "{name}" in phrasing else person["name"]
    prompt = phrasing.format(**person)
    return {"prompt": prompt[0].upper() + prompt[1:], "completion": f" {completion}."}


def training_facts(people: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """What is read: all people in every phrasing with the name first, every second one also description first."""
    facts = [make_fact(phrasing, person) for person in people for phrasing in NAME_FIRST]
    return facts + [make_fact(phrasing, person) for person in people[1::2] for phrasing in DESCRIPTION_FIRST]


def asked_facts(people: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """What is asked, by file: both halves of the people in both directions, in the first phrasing."""
    one_order, both_orders = people[0::2], people[1::2]
    (name_read, name_reversed), (description_read, description_reversed) = FILES["ntd"], FILES["dtn"]
    return {
        name_read: [make_fact(NAME_FIRST[0], person) for person in one_order],
        name_reversed: [make_fact(NAME_FIRST[0], person) for person in both_orders],
        description_read: [make_fact(DESCRIPTION_FIRST[0], person) for person in both_orders],
        description_reversed: [make_fact(DESCRIPTION_FIRST[0], person) for person in one_order],
    }
