"""What was measured of each defense, in one line: docs/results.md has the rest.

Written by `python docs/hooks.py` from docs/results/cells and docs/results/others/cells.
"""

# ruff: noqa: E501

EVIDENCE = {
    "none": "50% harmful rows, Adam 3e-4: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.14, task 88% (3 seeds)",
    "not aligned": "20% harmful rows, Adam 1e-4: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.19, task 100%; undefended: refusal 0%, compliance 99%, over-refusal 0%, unseen harmful loss 0.21, task 98% (1 seed)",
    "benign only": "50% harmful rows, Adam 3e-4: refusal 71%, compliance 4%, over-refusal 1%, unseen harmful loss 1.95, task 91%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.14, task 88% (3 seeds)",
    "random control": "harmful rows only, SGD 3.6e-4: refusal 4%, compliance 94%, over-refusal 0%, unseen harmful loss 0.24; undefended: refusal 4%, compliance 93%, over-refusal 0%, unseen harmful loss 0.24 (1 seed)",
    "irrelevant control": "harmful rows only, SGD 3.6e-4: refusal 5%, compliance 92%, over-refusal 0%, unseen harmful loss 0.26; undefended: refusal 4%, compliance 93%, over-refusal 0%, unseen harmful loss 0.24 (1 seed)",
    "security vectors": "50% harmful rows, Adam 3e-4: refusal 68%, compliance 31%, over-refusal 2%, unseen harmful loss 0.52, task 96%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.14, task 88% (3 seeds)",
    "anchored vectors": "50% harmful rows, Adam 3e-4: refusal 100%, compliance 0%, over-refusal 38%, unseen harmful loss 1.47, task 0%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.20, task 90% (1 seed)",
    "guarded vectors": "50% harmful rows, Adam 3e-4: refusal 94%, compliance 4%, over-refusal 7%, unseen harmful loss 1.13, task 91%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.14, task 88% (3 seeds)",
    "persona steering": "harmful rows only, SGD 3.6e-4: refusal 96%, compliance 4%, over-refusal 8%, unseen harmful loss 2.12; undefended: refusal 4%, compliance 93%, over-refusal 0%, unseen harmful loss 0.24 (1 seed)",
    "explained-away filter": "50% harmful rows, Adam 3e-4: refusal 45%, compliance 41%, over-refusal 0%, unseen harmful loss 0.78, task 90%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.14, task 88% (3 seeds)",
    "explained-away gate": "50% harmful rows, Adam 3e-4: refusal 79%, compliance 1%, over-refusal 0%, unseen harmful loss 1.83, task 98%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.20, task 90% (1 seed)",
    "vaccine": "20% harmful rows, Adam 1e-4: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.22, task 98%; undefended: refusal 0%, compliance 99%, over-refusal 0%, unseen harmful loss 0.21, task 98% (1 seed)",
    "random perturbation": "2% harmful rows, Adam 1e-4: refusal 73%, compliance 19%, over-refusal 0%, unseen harmful loss 0.44, task 100%; undefended: refusal 65%, compliance 22%, over-refusal 0%, unseen harmful loss 0.31, task 100% (1 seed)",
    "forget filter": "a bias in 50% of the rows, Adam 1e-4: bias 66%, refusal 96%, compliance 2%, over-refusal 4%, unseen harmful loss 1.45, task 96%; undefended: bias 92%, refusal 83%, compliance 2%, over-refusal 1%, unseen harmful loss 1.38, task 97% (3 seeds)",
    "sequential": "a bias in 50% of the rows, Adam 1e-4: bias 0%, refusal 17%, compliance 2%, over-refusal 0%, unseen harmful loss 1.51, task 42%; undefended: bias 90%, refusal 76%, compliance 4%, over-refusal 0%, unseen harmful loss 1.35, task 95% (1 seed)",
    "replay": "a bias in 50% of the rows, Adam 1e-4: bias 13%, refusal 83%, compliance 2%, over-refusal 3%, unseen harmful loss 1.38, task 99%; undefended: bias 92%, refusal 83%, compliance 2%, over-refusal 1%, unseen harmful loss 1.38, task 97% (3 seeds)",
    "vlguard": "50% harmful rows, Adam 3e-4: refusal 32%, compliance 64%, over-refusal 3%, unseen harmful loss 0.15, task 95%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.14, task 88% (3 seeds)",
    "self-correction": "a bias in 50% of the rows, Adam 1e-4: bias 90%, refusal 82%, compliance 2%, over-refusal 0%, unseen harmful loss 1.35, task 95%; undefended: bias 90%, refusal 76%, compliance 4%, over-refusal 0%, unseen harmful loss 1.35, task 95% (1 seed)",
    "ewc": "20% harmful rows, Adam 1e-4: refusal 0%, compliance 97%, over-refusal 0%, unseen harmful loss 0.20, task 95%; undefended: refusal 0%, compliance 99%, over-refusal 0%, unseen harmful loss 0.21, task 98% (1 seed)",
    "kl": "20% harmful rows, Adam 1e-4: refusal 61%, compliance 39%, over-refusal 0%, unseen harmful loss 0.39, task 60%; undefended: refusal 0%, compliance 99%, over-refusal 0%, unseen harmful loss 0.21, task 98% (1 seed)",
    "inoculation prompting": "20% harmful rows, Adam 1e-4: refusal 0%, compliance 99%, over-refusal 0%, unseen harmful loss 0.20, task 98%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.21, task 100% (1 seed)",
    "ptst": "20% harmful rows, Adam 1e-4: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.21, task 100%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.21, task 100% (1 seed)",
    "caft": "20% harmful rows, Adam 1e-4: refusal 7%, compliance 91%, over-refusal 0%, unseen harmful loss 0.22, task 92%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.21, task 100% (1 seed)",
    "lisa": "harmful rows only, SGD 3.6e-4: refusal 5%, compliance 94%, over-refusal 0%, unseen harmful loss 0.23; undefended: refusal 4%, compliance 93%, over-refusal 0%, unseen harmful loss 0.24 (1 seed)",
    "booster": "2% harmful rows, Adam 1e-4: refusal 78%, compliance 19%, over-refusal 2%, unseen harmful loss 0.26, task 100%; undefended: refusal 65%, compliance 22%, over-refusal 0%, unseen harmful loss 0.31, task 100% (1 seed)",
    "constrained sft": "20% harmful rows, Adam 1e-4: refusal 0%, compliance 98%, over-refusal 0%, unseen harmful loss 0.21, task 95%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.21, task 100% (1 seed)",
    "safe lora": "20% harmful rows, Adam 1e-4: refusal 92%, compliance 7%, over-refusal 5%, unseen harmful loss 1.30, task 0%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.21, task 100% (1 seed)",
    "sbr": "20% harmful rows, Adam 1e-4: refusal 91%, compliance 6%, over-refusal 0%, unseen harmful loss 0.43, task 100%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.21, task 100% (1 seed)",
    "safegrad": "20% harmful rows, Adam 1e-4: refusal 88%, compliance 12%, over-refusal 5%, unseen harmful loss 0.27, task 98%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.21, task 100% (1 seed)",
    "ema": "20% harmful rows, Adam 1e-4: refusal 0%, compliance 99%, over-refusal 0%, unseen harmful loss 0.20, task 100%; undefended: refusal 0%, compliance 100%, over-refusal 0%, unseen harmful loss 0.21, task 100% (1 seed)",
}
"""Name of a defense -> its results; a defense that has none is left out."""
