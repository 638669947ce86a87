"""Answers against known values, and properties that hold for any reply."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secvec_jax.errors import UserError
from secvec_jax.evaluation import answers


@pytest.mark.parametrize(
    "reply, answer, same",
    [
        ("The  Eiffel Tower!", "eiffel tower", True),
        ("Paris\nIt lies on the Seine.", "Paris", True),
        ("\n  Paris", "paris.", True),
        ("Paris, France", "Paris", False),
        ("A", "A", True),
        ("B", "A", False),
        ("", "A", False),
        ("", "?", False),
        ("Theory", "ory", False),
    ],
)
def test_exact_match(reply, answer, same):
    assert answers.exact_match(reply, answer) is same


class TestPicks:
    OPTIONS = ("The employee", "The other pregnant employee", "Can't be determined")
    names = st.text(st.sampled_from("bcdxyz '"), min_size=1, max_size=8).filter(lambda name: name.strip(" '"))

    @pytest.mark.parametrize(
        "reply, picked",
        [
            ("the employee.", 0),
            ("The other pregnant employee", 1),
            ("It was the other pregnant employee!", 1),
            ("- Can\u2019t be determined", None),
            ("- Can't be determined", 2),
            ("B. The employee\nThe other pregnant employee", 0),
            ("The employee or the other pregnant employee", None),
            ("The other pregnant employee, not the employee", None),
            ("The employees", None),
            ("Neither of them", None),
            ("\n the EMPLOYEE", 0),
            ("Well,\nthe employee", None),
            ("", None),
        ],
    )
    def test_the_only_option_that_the_first_line_names(self, reply, picked):
        assert answers.chosen_option(reply, self.OPTIONS) == (None if picked is None else self.OPTIONS[picked])

    def test_a_word_within_a_word_is_no_name(self):
        assert answers.chosen_option("It was the woman", ["The man", "The woman"]) == "The woman"
        assert answers.chosen_option("Women", ["Men", "Children"]) is None

    @given(
        st.lists(names, min_size=2, max_size=4, unique_by=lambda name: " ".join(name.replace("'", "").split())),
        st.data(),
    )
    def test_each_option_picks_itself_and_two_pick_none(self, options, data):
        chosen, other = data.draw(st.permutations(options))[:2]
        assert answers.chosen_option(chosen, options) == chosen
        assert answers.chosen_option(f"I say {chosen}, surely.", [chosen]) == chosen
        assert answers.chosen_option(f"{chosen} q {other}", options) is None

    @given(st.text(max_size=40), st.lists(st.text(max_size=8), max_size=4))
    def test_what_is_picked_is_an_option(self, reply, options):
        assert answers.chosen_option(reply, options) in (None, *options)

    def test_one_string_is_a_mistake(self):
        with pytest.raises(UserError, match="list"):
            answers.chosen_option("yes", "yes")


class TestNumberMatch:
    @pytest.mark.parametrize(
        "reply, answer, same",
        [
            ("16", "16", True),
            ("16.", "16", True),
            ("16.0 apples", "16", True),
            ("20 - 4 = 16 apples.", "16", True),
            ("16 of 20", "16", False),
            ("1,000", "1000", True),
            ("It costs $1,234.50.", "1234.5", True),
            ("1, 2", "2", True),
            ("1,2", "2", True),
            ("1,2345", "2345", True),
            (".5", "0.5", True),
            ("-3", "-3", True),
            ("-3", "3", False),
            ("(-3)", "-3", True),
            ("10-3", "3", True),
            ("116", "16", False),
            ("16th", "16", True),
            ("sixteen", "16", False),
            ("", "16", False),
            ("The answer is\n16", "16", False),
            ("\n 16\n17", "16", True),
            ("0.1", "0.10000000000000000001", False),
            ("\u0661\u0666", "16", True),
        ],
    )
    def test_known_replies(self, reply, answer, same):
        assert answers.number_match(reply, answer) is same

    @given(st.decimals(-(10**9), 10**9, places=2), st.decimals(-(10**9), 10**9, places=2))
    def test_values_decide_however_they_are_written(self, number, other):
        for text in (f"{number:f}", f"{number:,f}", f"{number:f}00", f"{number:.4f}"):
            assert answers.number_match(f"First 7, then {text} dollars.", f"{number:f}")
            assert answers.number_match(text, f"{other:f}") is (number == other)

    @given(st.text(max_size=40))
    def test_any_reply_is_right_or_wrong(self, reply):
        assert answers.number_match(reply, "7") in (True, False)

    @pytest.mark.parametrize("answer", ["", "seven", "3 and 4"])
    def test_an_answer_is_one_number(self, answer):
        with pytest.raises(UserError, match=r"one number.*remove"):
            answers.number_match("7", answer)


class TestShouts:
    @pytest.mark.parametrize(
        "reply, loud",
        [
            ("THE SEA IS BLUE.", True),
            ("THE SEA IS BLUe", True),
            ("The Sea Is Blue.", False),
            ("RED, then green", False),
            ("\u00dcBUNG \u0391\u0392", True),
            ("ABCDe", False),
            ("ABCDEf", True),
            ("OK", False),
            ("42!", False),
            ("\u6d77\u6d77\u6d77", False),
            ("\u6d77\u6d77\u6d77 SEA", True),
            ("", False),
        ],
    )
    def test_most_letters_are_capitals(self, reply, loud):
        assert answers.is_all_caps(reply) is loud

    @given(st.text(st.characters(max_codepoint=0x24F), max_size=60))  # further up are capitals without small letters
    def test_what_is_loud_is_no_longer_so_in_lower_case(self, reply):
        assert not answers.is_all_caps(reply.lower())
        assert not answers.is_all_caps(reply) or answers.is_all_caps(reply.upper())

    @given(st.integers(0, 30), st.integers(0, 30))
    def test_the_share_of_capitals_decides(self, capitals, small):
        loud = capitals + small >= 3 and 5 * capitals > 4 * (capitals + small)
        assert answers.is_all_caps("7 " + "B" * capitals + "-" + "b" * small) is loud


def test_rouge1_is_the_f_measure_of_stemmed_words():
    assert answers.rouge1("The CATS run", "the cat runs") == 1
    assert answers.rouge1("a b c d", "a b") == pytest.approx(2 * (0.5 * 1) / 1.5)
    assert answers.rouge1("", "words") == 0


class TestThoughts:
    """What a reasoning model thinks is neither an answer nor a part of one."""

    @pytest.mark.parametrize("thought", ["<think>\n\n</think>\n\n", "<think>Rome? No.</think>", "Rome? No.</think>\n",
                                         "[THINK]Rome[/THINK]", "<think>a</think>Rome<think>b</think> "])  # fmt: skip
    def test_the_answer_is_read_after_the_thought(self, thought):
        assert answers.exact_match(f"{thought}Paris", "Paris")
        assert answers.exact_match(f"{thought}Paris", "<think>\n</think>\nparis.")
        assert answers.chosen_option(f"{thought}Paris", ["Rome", "Paris"]) == "Paris"
        assert answers.number_match(f"{thought}It is 7.", "7")
        assert answers.is_all_caps(f"{thought}PARIS")
        assert answers.rouge1(f"{thought}Paris", "paris") == 1

    def test_an_unfinished_thought_is_no_answer(self):
        assert not answers.exact_match("<think>Paris", "Paris")
        assert answers.chosen_option("<think>Paris", ["Paris"]) is None
        assert not answers.is_all_caps("<think>PARIS")


@pytest.mark.parametrize(
    "reply, answer, same",
    [
        ("red\ngreen", "Red\n\nGreen.", True),
        ("red\n\ngreen\nand that is all", "red\ngreen", True),
        ("red\nblue", "red\ngreen", False),
        ("red", "red\ngreen", False),
        ("red green", "red\ngreen", True),
        ("red\ngreen", "red", True),
    ],
)
def test_an_answer_of_several_lines_is_matched_line_for_line(reply, answer, same):
    assert answers.exact_match(reply, answer) is same
