from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.data.class_names import index_class_names, normalise_class_name, quoted, readable_class_name


@pytest.mark.parametrize(
    "spelling", ["Alarm_Clock", "alarm-clock", "ALARM CLOCK", "alarm__clock", " alarm\tclock ", "alarm_-_clock"]
)
def test_spellings_of_one_class_compare_equal(spelling: str) -> None:
    assert normalise_class_name(spelling) == "alarm clock"


def test_composed_and_decomposed_accents_compare_equal() -> None:
    assert normalise_class_name("caf\u00e9") == normalise_class_name("cafe\u0301")
    assert normalise_class_name("caf\u00e9") != normalise_class_name("cafe")


def test_the_readable_form_keeps_case_and_hyphens() -> None:
    assert readable_class_name("African_T-shirt") == "African T-shirt"


def test_spellings_are_merged_and_classes_sorted() -> None:
    names, labels = index_class_names(["zebra", "Alarm_Clock", "alarm-clock", "Bird", "zebra"])
    assert names == ("Alarm Clock", "Bird", "zebra")
    assert labels.tolist() == [2, 0, 0, 1, 2]


@given(st.lists(st.sampled_from(["b", "B", "a_c", "A-c", "A C", "d"]), min_size=1), st.randoms(use_true_random=False))
def test_labels_do_not_depend_on_the_order_of_images(names: list[str], random: Random) -> None:
    order = list(range(len(names)))
    random.shuffle(order)
    class_names, labels = index_class_names(names)
    shuffled_names, shuffled_labels = index_class_names([names[i] for i in order])
    assert shuffled_names == class_names
    np.testing.assert_array_equal(shuffled_labels, labels[order])


def test_long_lists_of_names_are_cut_in_messages() -> None:
    assert quoted(["a", "b"]) == "'a', 'b'"
    assert quoted(["a", "b", "c"], limit=2) == "'a', 'b' and 1 more"
