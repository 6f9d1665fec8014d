import logging
import logging.handlers
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.data.index.faults import FAULT_NAMES, FAULTS, Fault, FaultLog, SampleFault, fault_table


@pytest.fixture
def log():
    return FaultLog(logging.getLogger("laver_megatron.test"), first=2)


def test_every_fault_has_a_name_a_code_and_a_description():
    assert len({fault.description for fault in FAULTS}) == len(FAULTS)
    assert all(FAULT_NAMES[fault.code] == fault.value == fault.name for fault in FAULTS)
    assert FAULT_NAMES[0] == ""


def test_a_sample_fault_survives_the_way_from_a_worker():
    fault = pickle.loads(pickle.dumps(SampleFault(Fault.no_turns, "why")))
    assert fault.fault is Fault.no_turns and str(fault) == "why" and isinstance(fault, ValueError)


def test_the_log_names_the_first_and_then_every_power_of_ten(log, caplog):
    for number in range(1, 1001):
        log.add(Fault.no_turns, "a.tar", f"k{number}", f"detail {number}")
    assert [message.split("'")[1] for message in caplog.messages] == ["k1", "k2", "k10", "k100", "k1000"]
    assert caplog.messages[0] == "a.tar: 'k1' cannot be used (no_turns, 1 so far): detail 1"
    assert caplog.messages[1].endswith("detail 2; more of these are counted and rarely logged")
    assert log.counts == {Fault.no_turns: 1000}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, len(FAULTS)), max_size=150), st.integers(0, 12))
def test_many_rows_are_added_as_one_after_the_other(codes, before):
    messages, counts = [], []
    for together in (False, True):
        logger = logging.Logger("test")
        logger.addHandler(handler := logging.handlers.BufferingHandler(1000))
        log = FaultLog(logger, first=2)
        for _ in range(before):
            log.add(FAULTS[0], "b.tar", "x")
        if together:
            log.add_rows(np.arange(len(codes)), np.array(codes, int), lambda row: ("a.tar", f"k{row}"))
        else:
            for row, code in enumerate(codes):
                log.add(FAULTS[code - 1], "a.tar", f"k{row}")
        messages.append([record.getMessage() for record in handler.buffer])
        counts.append(log.counts)
    assert messages[0] == messages[1] and counts[0] == counts[1]


def test_each_fault_is_limited_by_itself(log, caplog):
    for fault in FAULTS * 3:
        log.add(fault, "a.tar", "k")
    assert len(caplog.messages) == 2 * len(FAULTS) - 1
    assert sum("--images" in message for message in caplog.messages) == 1  # one line says it of all
    assert all(any(fault.description in message for message in caplog.messages) for fault in FAULTS)


def test_a_key_cannot_break_the_log(log, caplog):
    log.add(Fault.unsafe_key, "a.tar", "k\n2026-01-01 ERROR all is lost")
    assert "\n" not in caplog.messages[0]


def test_check(log):
    log.add(Fault.no_turns, "a.tar", "k")
    log.check(0.01, 100)
    log.add(Fault.invalid_json, "a.tar", "k")
    with pytest.raises(ValueError, match=r"2 of 100 samples .*2.0%, allowed are 1.0%.*--max-bad-fraction") as caught:
        log.check(0.01, 100)
    assert "1  invalid_json" in str(caught.value)
    log.check(0.02, 100)
    with pytest.raises(ValueError, match="3 of 100 samples") as caught:
        log.check(0.02, 100, num_bad=3, found={Fault.no_json: 3})
    assert "3  no_json" in str(caught.value) and "invalid_json" not in str(caught.value)


@pytest.mark.parametrize(
    "num_bad, num_samples, limit, text",
    [
        (4, 384, 0.01, "1.04%, allowed are 1.00%"),
        (1_000_001, 10**8, 0.01, "1.000001%, allowed are 1.000000%"),
        (1, 3, 0, "33.3%, allowed are 0.0%"),
    ],
)
def test_a_share_differs_visibly_from_the_limit(log, num_bad, num_samples, limit, text):
    with pytest.raises(ValueError, match="samples cannot be used") as caught:
        log.check(limit, num_samples, num_bad, {})
    assert f"({text});" in str(caught.value) and str(caught.value).endswith("was logged before this start")


def test_the_table_is_sorted_and_takes_names_of_its_own():
    lines = fault_table({Fault.no_turns: 2, Fault.no_json: 1234, "other": 3}).splitlines()
    assert [line.split()[:2] for line in lines] == [["1,234", "no_json"], ["3", "other"], ["2", "no_turns"]]
