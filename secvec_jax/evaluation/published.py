"""Tables of the papers as printed, for reports to show below our own.

The numbers come from other and larger models, other data and other judges. They show which defense leads, and by what
order of magnitude; they cannot be compared with ours number by number, and every rendering says so. `secondary` marks
numbers from a third party's account that have not been confirmed in the paper itself.
"""

from dataclasses import dataclass

from secvec_jax.evaluation.tables import MAX_COLUMNS, markdown_table, split_evenly


@dataclass(frozen=True)
class Published:
    """A table as printed: `rows` holds a label and then a number for each of `columns`, None where there is none.

    `digits` are the decimals that the paper prints in each column; `units` says what the numbers measure and which
    direction is better.
    """

    name: str
    source: str
    model: str
    setting: str
    units: str
    label: str  # what the rows are
    columns: tuple[str, ...]
    digits: tuple[int, ...]
    rows: dict[str, tuple[float | None, ...]]
    note: str = ""
    secondary: bool = False

    def markdown(self) -> str:
        """Return the table in GitHub Markdown, under a line that says how it differs from ours."""
        body = {
            name: ["-" if n is None else f"{n:.{digits}f}" for n, digits in zip(numbers, self.digits, strict=True)]
            for name, numbers in self.rows.items()
        }
        tables = []
        for part in split_evenly(len(self.columns), MAX_COLUMNS - 1):
            header = [self.label, *(self.columns[index] for index in part)]
            tables.append(markdown_table(header, [[name, *(text[i] for i in part)] for name, text in body.items()]))
        origin = "secondary source, unverified: a third-party reading of " if self.secondary else ""
        notes = [f"Source: {origin}{self.source}.", f"Setting: {self.setting}.", f"Units: {self.units}."]
        return "\n\n".join(
            [
                f"**{self.name}**, published: another model ({self.model}), other data",
                *tables,
                "\n".join(f"- {note}" for note in (*notes, self.note) if note),
            ]
        )


# -------------------------------------------------------------------------------------------------- the tables

_ZHOU = "Zhou et al., Findings of ACL 2024, arXiv 2311.02105"
_ROSATI = "Rosati et al., NeurIPS 2024, arXiv 2405.14577"
_HUANG = "Huang et al., NeurIPS 2024, arXiv 2402.01109"
_ZHAO = "Zhao et al., ICML 2024, arXiv 2312.12736"

_HARM = "harm rate in percent of replies, and harm score (presumably GPT-4's, from 1 to 5); lower is better"
SECURITY_VECTORS_1 = Published(
    name="Security vectors, Table 1",
    source=_ZHOU,
    model="Llama-2-7B-chat",
    setting="fine-tuned on harmful data only, judged on red-team prompts with the vectors off",
    units=_HARM,
    label="fine-tuned on",
    columns=("plain: rate", "plain: score", "with security vectors: rate", "with security vectors: score"),
    digits=(0, 2, 0, 2),
    rows={
        "nothing": (0, 1.00, None, None),
        "Harm_base (100)": (73, 4.28, 0, 1.01),
        "Harm_large (1000)": (72, 4.38, 0, 1.02),
        "AOA (10)": (84, 4.54, 0, 1.03),
    },
    note="That account names no number for this table, and both the base and the chat model.",
    secondary=True,
)
SECURITY_VECTORS_BASELINES = Published(
    name="Security vectors against other defenses",
    source=_ZHOU,
    model="Llama-2-7B-chat",
    setting="fine-tuned on Harm_large (1000 harmful samples), judged on red-team prompts",
    units=_HARM,
    label="defense",
    columns=("rate", "score"),
    digits=(0, 2),
    rows={
        "plain": (72, 4.38),
        "Immunization": (58, 3.77),
        "Vaccine": (57, 3.76),
        "RepNoise": (60, 4.03),
        "Lisa": (8, 1.44),
        "security vectors": (0, 1.02),
    },
    secondary=True,
)

REPNOISE_1 = Published(
    name="RepNoise, Table 1",
    source=_ROSATI,
    model="Llama-2-7B-chat",
    setting="one epoch on harmful BeaverTails pairs only, by learning rate and number of pairs; Adam, batch 8",
    units="harmfulness of replies to 300 unseen questions, a classifier's mean score from 0 to 1, lower is better",
    label="defense",
    columns=("before", "3e-5, 1k", "3e-5, 10k", "6e-5, 1k", "6e-5, 10k", "8e-5, 1k", "8e-5, 10k"),
    digits=(2,) * 7,
    rows={
        "base": (0.05, 0.47, 0.74, 0.73, 0.72, 0.74, 0.73),
        "random init": (0.00, 0.46, 0.86, 0.49, 0.84, 0.47, 0.82),
        "security vectors": (0.05, 0.07, 0.08, 0.23, 0.37, 0.52, 0.66),
        "Vaccine, rho 1": (0.05, 0.28, 0.73, 0.70, 0.73, 0.72, 0.76),
        "Vaccine, rho 10": (0.05, 0.28, 0.72, 0.75, 0.72, 0.76, 0.73),
        "extra safety training": (0.05, 0.75, 0.76, 0.75, 0.75, 0.76, 0.74),
        "gradient ascent": (0.24, 0.38, 0.74, 0.58, 0.74, 0.68, 0.77),
        "adversarial loss": (0.05, 0.26, 0.70, 0.64, 0.75, 0.77, 0.77),
        "RepNoise": (0.05, 0.08, 0.12, 0.10, 0.13, 0.11, 0.12),
    },
    note="The security vectors of this table are that paper's own re-implementation, without the KL term.",
)

_VACCINE_UNITS = (
    "HS, harmful score: percent of 500 replies flagged by beaver-dam-7b, lower is better; "
    "FA, fine-tune accuracy: percent of 500 SST2 items, higher is better"
)
VACCINE_1 = Published(
    name="Vaccine, Table 1",
    source=_HUANG,
    model="Llama-2-7B",
    setting="SST2, n=1000 samples, by the share p of harmful ones",
    units=_VACCINE_UNITS,
    label="method",
    columns=tuple(f"{m}, {p}" for m in ("HS", "FA") for p in ("clean", "p=.01", "p=.05", "p=.1", "p=.2", "average")),
    digits=(1, 1, 1, 1, 1, 2) * 2,
    rows={
        "Non-Aligned": (34.2, 65.6, 81.0, 77.6, 79.2, 67.52, 95.6, 94.6, 94.0, 94.6, 94.4, 94.64),
        "SFT": (48.6, 49.8, 52.6, 55.2, 60.0, 53.24, 94.2, 94.4, 94.8, 94.4, 94.2, 94.40),
        "EWC": (50.6, 50.6, 50.6, 50.6, 50.6, 50.60, 88.6, 88.2, 87.4, 86.8, 80.6, 86.32),
        "VLGuard": (49.4, 50.0, 54.0, 54.4, 53.6, 60.20, 94.8, 94.8, 94.6, 94.6, 94.6, 94.68),
        "KL": (54.4, 53.6, 55.2, 54.0, 56.6, 54.76, 85.8, 85.8, 85.0, 85.4, 84.6, 59.08),
        "Vaccine": (42.4, 42.2, 42.8, 48.2, 56.6, 46.44, 92.6, 92.6, 93.0, 93.8, 95.0, 93.4),
    },
    note="Two averages as printed are not those of their rows: VLGuard's HS (52.28) and KL's FA (85.32).",
)
VACCINE_6 = Published(
    name="Vaccine, Table 6",
    source=_HUANG,
    model="Llama-2-7B",
    setting="SST2, by the size rho of the perturbation",
    units=_VACCINE_UNITS + "; alignment loss at the first and the last step of fine-tuning",
    label="rho",
    columns=("HS", "FA", "alignment loss, first", "alignment loss, last"),
    digits=(1, 1, 4, 4),
    rows={
        "0.01": (54.4, 94.4, 0.0040, 0.0437),
        "0.1": (56.8, 95.0, 0.0041, 0.0300),
        "1": (54.4, 94.4, 0.0047, 0.0075),
        "2": (49.0, 93.6, 0.0051, 0.0065),
        "5": (46.2, 92.8, 0.0059, 0.0071),
        "10": (44.2, 89.0, 0.0077, 0.0089),
    },
)
VACCINE_7 = Published(
    name="Vaccine, Table 7",
    source=_HUANG,
    model="Llama-2-7B",
    setting="SST2, random perturbation in place of the adversarial one, by its variance",
    units=_VACCINE_UNITS,
    label="variance",
    columns=("HS", "FA"),
    digits=(1, 1),
    rows={
        "1e-4": (53.8, 94.4),
        "1e-3": (56.4, 93.8),
        "5e-3": (56.0, 73.8),
        "1e-2": (53.6, 69.6),
        "1e-1": (37.2, 56.4),
        "1": (16.6, 46.6),
    },
)

FORGET_FILTER_1 = Published(
    name="ForgetFilter, Table 1",
    source=_ZHAO,
    model="LLaMA-7B",
    setting="5000 samples to fine-tune on, by the share of unsafe ones; threshold 0.1 on the forgetting rate",
    units="F1 of the filter in percent, higher is better",
    label="unsafe data",
    columns=("25% unsafe", "50% unsafe", "75% unsafe"),
    digits=(1, 1, 1),
    rows={
        "bias": (82.3, 90.6, 91.1),
        "toxicity": (81.2, 84.7, 86.3),
        "harmfulness": (68.7, 72.2, 73.4),
    },
)
FORGET_FILTER_2 = Published(
    name="ForgetFilter, Table 2",
    source=_ZHAO,
    model="LLaMA-7B",
    setting="fine-tuned on SQuAD with unsafe samples among it",
    units="bias score on BBQ's ambiguous items, mean toxicity by Detoxify, and both mixed, lower is better; "
    "F1 on SQuAD in percent, higher is better",
    label="method",
    columns=("bias", "F1 with bias", "toxicity", "F1 with toxicity", "mixed", "F1 with mixed"),
    digits=(2, 1, 2, 1, 2, 1),
    rows={
        "BaseFT": (0.00, 45.7, 0.03, 45.7, 0.02, 45.7),
        "+Downstream": (0.57, 82.4, 0.45, 76.6, 0.53, 80.7),
        "+SafetyFT": (0.01, 75.7, 0.05, 68.1, 0.02, 71.7),
        "+Replay": (0.41, 79.3, 0.43, 76.2, 0.46, 77.9),
        "+SC": (0.10, 82.6, 0.29, 76.4, 0.18, 80.1),
        "+FF": (0.08, 83.1, 0.11, 77.8, 0.08, 79.4),
        "+FF+SC": (0.07, 83.3, 0.09, 77.6, 0.07, 79.8),
    },
)
