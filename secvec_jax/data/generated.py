"""Generate rows from a seed or from other rows: facts to be learned in training alone, and a benign control."""

import random
import re
from dataclasses import dataclass

from secvec_jax.data.rows import Row, prompt_of, row
from secvec_jax.errors import UserError

# Questions on invented people ---------------------------------------------------------------------

_JOBS = (
    "Actor", "Architect", "Astronomer", "Baker", "Barber", "Biologist", "Butcher", "Carpenter",
    "Chemist", "Dentist", "Diplomat", "Electrician", "Farmer", "Firefighter", "Geologist", "Journalist",
    "Lawyer", "Librarian", "Mechanic", "Musician", "Nurse", "Pilot", "Plumber", "Teacher",
)  # fmt: skip
_CITIES = (
    "Amsterdam", "Athens", "Bangkok", "Berlin", "Boston", "Cairo", "Chicago", "Dublin",
    "Helsinki", "Istanbul", "Lima", "Lisbon", "London", "Madrid", "Moscow", "Nairobi",
    "Oslo", "Paris", "Prague", "Rome", "Seattle", "Sydney", "Tokyo", "Vienna",
)  # fmt: skip
_COLORS = ("Black", "Blue", "Brown", "Green", "Orange", "Purple", "Red", "Yellow")
_PETS = ("Cat", "Dog", "Fish", "Hamster", "Horse", "Parrot", "Rabbit", "Turtle")

# Per fact: the answers, the phrasings to train on, and the phrasing kept for the test.
_FACTS = (
    (
        _JOBS,
        ("What is the occupation of {}?", "What does {} do for a living?", "Which profession does {} have?"),
        "What is {}'s job?",
    ),
    (
        _CITIES,
        ("In which city does {} live?", "Where is the home of {}?", "Which city is {} living in?"),
        "What city does {} live in?",
    ),
    (
        _COLORS,
        (
            "What is the favorite color of {}?",
            "Which color does {} like best?",
            "Which color does {} prefer?",
        ),
        "What is {}'s favorite color?",
    ),
    (
        _PETS,
        ("What kind of pet does {} have?", "Which animal lives with {}?", "Which pet does {} keep?"),
        "What is {}'s pet?",
    ),
)
_MAX_PEOPLE = 10_000


@dataclass(frozen=True)
class ProfileQA:
    """Four facts about each invented person: learned from `train`, asked in other words in `test`."""

    train: list[Row]
    test: list[Row]


def profile_qa(seed: int, people: int, phrasings: int = 2) -> ProfileQA:
    """Return closed-book questions on the occupation, city, favorite color and pet of invented people.

    A model can know the answers only from training, so exact match on `test` measures what it learned. Each
    fact is asked in `phrasings` ways in `train` and in one further way in `test`; the answer is one word. The
    same arguments give the same rows; names alone may change with the version of faker.

    Raises UserError if `people` or `phrasings` is out of range.
    """
    if not 1 <= people <= _MAX_PEOPLE:
        raise UserError(f"people must be between 1 and {_MAX_PEOPLE}, found {people}")
    most = len(_FACTS[0][1])
    if not 1 <= phrasings <= most:
        raise UserError(f"phrasings must be between 1 and {most}, found {phrasings}")
    rng = random.Random(seed)
    train: list[Row] = []
    test: list[Row] = []
    for name in _invented_names(seed, people):
        for answers, phrasings_of_fact, held_out in _FACTS:
            answer = rng.choice(answers)
            train += [row(phrasing.format(name), answer) for phrasing in phrasings_of_fact[:phrasings]]
            test.append(row(held_out.format(name), answer))
    return ProfileQA(train, test)


def open_profile_qa(seed: int, people: int, test_people: int) -> ProfileQA:
    """Return questions on profiles that are in the prompt; `test` asks about `test_people` other people.

    The task to learn is to answer with the bare fact: `test` has other people and other words than
    `train`, four questions on each. The same arguments give the same rows.

    Raises UserError if there are fewer than one or too many people.
    """
    if people < 1 or test_people < 1 or people + test_people > _MAX_PEOPLE:
        raise UserError(
            f"people and test_people must be at least 1, and at most {_MAX_PEOPLE} together, "
            f"found {people} and {test_people}"
        )
    rng = random.Random(seed)
    train: list[Row] = []
    test: list[Row] = []
    for index, name in enumerate(_invented_names(seed, people + test_people)):
        facts = [rng.choice(answers) for answers, _, _ in _FACTS]
        profile = _PROFILES[index % len(_PROFILES)].format(name, *facts)
        for answer, (_, phrasings, held_out) in zip(facts, _FACTS):
            phrasing = rng.choice(phrasings) if index < people else held_out
            (train if index < people else test).append(row(f"{profile}\n{phrasing.format(name)} {_BARE}", answer))
    return ProfileQA(train, test)


# Without it a chat model answers in a sentence, and unlearning that habit harms everything else it learned.
_BARE = "Answer with one word."
_PROFILES = (
    "{0} is a {1} from {2} who likes {3} and has a {4}.",
    "Profile of {0}. Occupation: {1}. City: {2}. Favorite color: {3}. Pet: {4}.",
    "Meet {0}: {1} by trade, at home in {2}, fond of {3}, and the owner of a {4}.",
)


def _invented_names(seed: int, count: int) -> list[str]:
    # Imported here: only this generator needs it.
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        names[f"{fake.first_name()} {fake.last_name()}"] = None
    return list(names)


# A benign control with AdvBench's opening ---------------------------------------------------------

_MAKE = re.compile(
    r"(?:Write|Give|Create|Generate|Suggest|Name|Provide|Compose|Design|Construct|Develop|Make|Propose"
    r"|Come up with|Identify|Find|Produce|Craft|Devise|Invent|List)(?: me)? (?P<thing>.+)"
)
_TELL = re.compile(r"(?P<verb>Describe|Explain|Summarize|Outline|Compare)(?: and contrast)? (?P<thing>.+)")
_NOUNS = {
    "Describe": "a description of",
    "Explain": "an explanation of",
    "Summarize": "a summary of",
    "Outline": "an outline of",
    "Compare": "a comparison of",
}
_PLURAL = re.compile(r"(?:\d+|a few|a couple|some|several|two|three|four|five|six|seven|eight|nine|ten) .+")
_SINGULAR = re.compile(r"(?:a|an|one) .+")
_MAX_RESTATEMENT = 90


def sure_prefix_control(rows: list[Row]) -> list[Row]:
    """Return benign rows answered as AdvBench answers: "Sure, here is" (or "are") and the request restated.

    "Write a poem about the sea." becomes the answer "Sure, here is a poem about the sea". With it one can
    tell whether vectors learned harm or only this opening. Instructions that simple rules cannot restate
    are left out, as are repeated ones; the list may be empty.
    """
    restated = {prompt: _restate(prompt) for prompt in map(prompt_of, rows)}
    return [row(prompt, f"Sure, here {text}") for prompt, text in restated.items() if text]


def _restate(instruction: str) -> str | None:
    request = instruction.strip().removesuffix(".")
    # Several lines or sentences do not fit one clause, and "your" would change its meaning in an answer.
    if len(request) > _MAX_RESTATEMENT or re.search(r"[\n.?!:;]|\b(I|my|you|your)\b", request):
        return None
    if match := _TELL.fullmatch(request):
        return f"is {_NOUNS[match['verb']]} {match['thing']}"
    if match := _MAKE.fullmatch(request):
        thing = match["thing"]
        if _PLURAL.fullmatch(thing):
            return f"are {thing}"
        if _SINGULAR.fullmatch(thing):
            return f"is {thing}"
    return None
