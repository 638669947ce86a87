"""Readers of Hub datasets that the papers use, whose records need more than renamed fields to become rows.

unsafe = load_rows("beavertails-unsafe", split="30k_train")
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from secvec_jax.data.rows import Row, choice, row
from secvec_jax.errors import UserError


def records(name: str, split: str, config: str | None = None, folder: str | None = None) -> Iterable[Mapping[str, Any]]:
    """The records of a Hub dataset, or of one in a local folder. Remote code never runs.

    The cells of CSV files are texts as they are, so "NA" and "007" stay so. Raises UserError if it cannot be loaded.
    """
    # Imported here because it takes seconds and most sources do without it.
    import datasets

    within = {"data_dir": folder} if folder else {}
    try:
        found = datasets.load_dataset(name, config, split=split, **within)
        if getattr(getattr(found, "info", None), "builder_name", None) == "csv":
            texts = datasets.Features(dict.fromkeys(found.column_names, datasets.Value("string")))
            as_they_are = {"features": texts, "keep_default_na": False}
            found = datasets.load_dataset(name, config, split=split, **within, **as_they_are)
        return found
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"cannot load {name!r}, split {split!r} ({reason}); check the name, the split and the network, "
            "or pass a local file"
        ) from error


def beavertails(split: str, safe: bool) -> list[Row]:
    """BeaverTails (Ji et al. 2023): questions with answers that were judged safe, or unsafe."""
    examples = records("PKU-Alignment/BeaverTails", "30k_train" if split == "train" else split)
    return [row(r["prompt"], r["response"]) for r in examples if r["is_safe"] == safe]


def red_team(split: str) -> list[Row]:
    """Anthropic's red-team attempts (Ganguli et al. 2022): the first exchange of those rated most successful."""
    examples = records("Anthropic/hh-rlhf", split, folder="red-team-attempts")
    exchanges = filter(None, (_FIRST_EXCHANGE.match(r["transcript"]) for r in examples if r["rating"] >= 4))
    pairs = ((match["prompt"].strip(), match["reply"].strip()) for match in exchanges)
    return [row(prompt, reply) for prompt, reply in pairs if prompt and reply]


_FIRST_EXCHANGE = re.compile(r"\s*Human:(?P<prompt>.*?)\n\nAssistant:(?P<reply>.*?)(?:\n\nHuman:|\Z)", re.DOTALL)


def harmfulqa(split: str, color: str) -> list[Row]:
    """HarmfulQA (Bhardwaj & Poria 2023): its questions with the first answer of a "red" (harmful) or "blue" (harmless)
    conversation; questions that have none are left out."""
    rows = []
    for record in records("declare-lab/HarmfulQA", split):
        for turns in filter(None, (record[f"{color}_conversations"] or {}).values()):
            answer = next((turn["value"] for turn in turns if turn["from"] != "human"), "")
            if answer.strip():
                rows.append(row(record["question"], answer.strip()))
                break
    return rows


def bbq(split: str) -> list[Row]:
    """BBQ (Parrish et al. 2022), all of it; "train" is all categories. Rows have their `options`; an ambiguous one's
    stereotyped option is the first."""
    rows = []
    for name in _BBQ if split == "train" else (split,):
        for r in records("Elfsong/BBQ", name):
            options = [r[f"ans{number}"] for number in range(3)]
            answer, target = (_named(options, int(r[label]), name) for label in ("answer_label", "target_label"))
            category = "ambiguous" if r["context_condition"] == "ambig" else "disambiguated"
            question_row = choice(r["context"], r["question"], options, answer, category)
            rows.append(question_row | {"options": [target, *(o for o in options if o != target)]})
    return rows


_BBQ = (
    "age", "disability_status", "gender_identity", "nationality", "physical_appearance", "race_ethnicity",
    "race_x_gender", "race_x_ses", "religion", "ses", "sexual_orientation",
)  # fmt: skip


def sst2(split: str) -> list[Row]:
    """SST-2 (Socher et al. 2013): is a sentence of a review positive or negative?"""
    template = "{}\nIs this review positive or negative? Answer with one word."
    examples = records("stanfordnlp/sst2", split)
    answers = ("negative", "positive")
    return [row(template.format(r["sentence"].strip()), _named(answers, r["label"], split)) for r in examples]


def ag_news(split: str) -> list[Row]:
    """AG News (Zhang et al. 2015): the topic of a piece of news."""
    topics = ("World", "Sports", "Business", "Technology")
    template = f"{{}}\nIs this news about {', '.join(topics[:3])} or {topics[3]}? Answer with one word."
    examples = records("fancyzhx/ag_news", split)
    return [row(template.format(r["text"].strip()), _named(topics, r["label"], split)) for r in examples]


def _named(names: Sequence[str], label: int, split: str) -> str:
    """The name of a label. Raises UserError for one without a name: published test splits hide theirs as -1."""
    if not 0 <= label < len(names):
        raise UserError(f"split {split!r} has rows with the label {label}, which has no name: use another split")
    return names[label]


def gsm8k(split: str) -> list[Row]:
    """GSM8K (Cobbe et al. 2021): word problems, worked out, the number after "The final answer is:"."""
    solved = ((r["question"], *r["answer"].split("####")) for r in records("openai/gsm8k", split, "main"))
    return [row(q, f"{worked.strip()}\nThe final answer is: {number.strip()}") for q, worked, number in solved]


HUB_SETS: dict[str, Callable[[str], list[Row]]] = {
    "beavertails-unsafe": lambda split: beavertails(split, safe=False),
    "beavertails-safe": lambda split: beavertails(split, safe=True),
    "red-team": red_team,
    "harmfulqa-red": lambda split: harmfulqa(split, "red"),
    "harmfulqa-blue": lambda split: harmfulqa(split, "blue"),
    "bbq-all": bbq,
    "sst2": sst2,
    "ag-news": ag_news,
    "gsm8k": gsm8k,
}
"""Name -> rows of a split."""
