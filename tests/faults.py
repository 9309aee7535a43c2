"""The reliability scorecard: which tests show each fault, and which show that its guard matters. `make faults` runs it.

    FAULTS      F1-F30 -> what goes wrong, the tests in which the right thing then happens, those with the guard off
    FIGURES     M1-M10 -> what is measured, and the bar; tests give the values by record_property
    PARTS       what an error message is made of; with a first line that is the cause it has up to five points
    Scores      collects outcomes, messages and figures of a pytest run
    main        runs them all in one pytest, prints the table, and writes it into docs/reliability.md with --write

A test stands here by its node id; without its parameters it means all of them.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- scorecard -->", "<!-- end of scorecard -->"

CASE_SECONDS, FEWEST_POINTS = 60.0, 4
"""A test of a fault takes no longer; a message has no fewer points."""


class Fault(NamedTuple):
    """One line of the scorecard."""

    what: str
    holds: tuple[str, ...]
    """Tests in which the fault is injected and the right thing happens."""
    without: tuple[str, ...]
    """Tests in which the guard is off, and the fault then does its harm or is seen to."""
    speaks: bool = False
    """The user must be told: tests of `holds` record each message (`said`) and whether its first line is the cause."""


BAD = "tests/test_bad_input.py::test_one_clean_message"
OFF = "tests/test_bad_input.py::test_without_its_guard_a_case_fails"
ON = "tests/distributed/test_faults_and_guards.py"
RECOVERY = "tests/distributed/test_recovery.py"
HEALTH = "tests/distributed/test_health.py"
KILLED = "tests/distributed/test_killed_saves.py"
DAMAGE = "tests/unit/checkpoint/test_checkpoint_damage.py"
WEIGHTS = "tests/unit/checkpoint/test_folder.py"
OWNER = "tests/unit/checkpoint/test_owner.py"
LAUNCH = "tests/distributed/test_launch.py"
RESUME = "tests/distributed/test_resume.py"
NUMBERS = "tests/distributed/test_numbers.py"
FOLDER = "tests/unit/checkpoint/test_dcp_folder.py"
PACKING = "tests/unit/model/test_packing.py"
SECURITY = "tests/test_security.py"
FLAWS = "tests/test_llama_recipes_flaws.py"


def _bad(what: str, *names: str, off: str) -> Fault:
    """Cases of test_bad_input.py, and the one that is shown without its guard."""
    return Fault(what, tuple(f"{BAD}[{name}]" for name in names), (f"{OFF}[{off}]",), speaks=True)


FAULTS: dict[str, Fault] = {
    "F1": _bad("missing column", "missing_column", "one_row_lacks_a_column", off="missing_column"),
    "F2": _bad("malformed line 37", "bad_json_line", off="bad_json_line"),
    "F3": _bad("not UTF-8", "not_utf8", off="not_utf8"),
    "F4": _bad("empty rows, some and all", "empty_answer", "every_answer_empty", off="empty_answer"),
    "F5": _bad("every row too long", "every_row_too_long", off="every_row_too_long"),
    "F6": _bad("nothing is labelled", "custom_rows_teach_nothing", off="custom_rows_teach_nothing"),
    "F7": _bad(
        "ids beyond the vocabulary",
        "ids_beyond_the_vocabulary",
        "tokenizer_longer_than_the_embedding",
        off="ids_beyond_the_vocabulary",
    ),
    "F8": _bad(
        "weights cut short, an LFS pointer, a shard missing",
        "weights_cut_short",
        "weights_are_an_lfs_pointer",
        "shard_missing",
        off="weights_cut_short",
    ),
    "F9": Fault(
        "flipped bits in a checkpoint, and in weights of the hub",
        (
            f"{BAD}[hubs_weights_flipped]",
            f"{WEIGHTS}::test_flipped_bits_of_the_hubs_files_are_found",
            f"{FOLDER}::test_one_wrong_bit_anywhere_is_noticed",
            f"{FOLDER}::test_files_of_two_checkpoints_do_not_mix",
            f"{FOLDER}::test_a_damaged_one_is_set_aside_and_an_older_one_used",
        ),
        (
            f"{DAMAGE}::test_without_digests_a_flip_would_be_missed",
            f"{OFF}[hubs_weights_flipped]",
        ),
        speaks=True,
    ),
    "F10": _bad(
        "config and weights of two models",
        "config_of_another_size",
        "tensor_missing",
        "tensor_misshaped",
        off="config_of_another_size",
    ),
    "F11": _bad(
        "LoRA targets that match nothing",
        "target_matches_nothing",
        "pattern_matches_nothing",
        off="target_matches_nothing",
    ),
    "F12": _bad("too few rows", "too_few_rows_for_validation", off="too_few_rows_for_validation"),
    "F13": Fault(
        "a rank is killed, each in turn; of four ranks as well",
        (
            f"{RECOVERY}::test_ranks_that_are_killed_are_replaced_and_the_run_is_the_same_to_the_last_bit",
            f"{RECOVERY}::test_four_ranks_as_well",
        ),
        (f"{ON}::test_without_restarts_a_killed_rank_is_the_end", f"{RESUME}::test_what_is_not_restored_is_noticed"),
        speaks=True,
    ),
    "F14": Fault(
        "kills again and again",
        (
            f"{RECOVERY}::test_kills_at_any_time_are_recovered_from_within_seconds",
            f"{ON}::test_with_them_it_comes_to_its_end",
        ),
        (f"{ON}::test_without_checkpoints_a_loop_of_kills_gets_nowhere",),
    ),
    "F15": Fault(
        "an exception on rank 1",
        (
            f"{RECOVERY}::test_the_first_cause_is_told_first_once_and_with_its_rank",
            f"{RECOVERY}::test_an_error_that_comes_again_is_not_tried_a_third_time",
        ),
        (f"{ON}::test_without_first_causes_the_echo_is_printed_too",),
        speaks=True,
    ),
    "F16": Fault(
        "memory runs out on rank 1 (RLIMIT_AS)",
        (f"{ON}::test_out_of_memory_on_one_rank_is_told_and_not_tried_again",),
        (f"{ON}::test_without_that_word_it_is_tried_again",),
        speaks=True,
    ),
    "F17": Fault(
        "a rank stops (SIGSTOP), sleeps, holds Python's lock",
        (
            f"{LAUNCH}::test_a_rank_that_stands_still_is_named_with_its_stack",
            f"{RECOVERY}::test_a_run_that_hangs_is_told_where_and_goes_on",
        ),
        (f"{ON}::test_without_the_watch_a_hang_is_silent",),
        speaks=True,
    ),
    "F18": Fault(
        "uneven batches",
        (
            "tests/unit/data/test_data_loader.py::test_one_row_on_many_ranks",
            "tests/unit/data/test_data_loader.py::test_a_short_last_step_keeps_ranks_in_step",
            f"{PACKING}::test_an_empty_batch_gives_an_exact_zero_and_a_gradient_for_every_parameter",
        ),
        (f"{NUMBERS}::test_a_mean_of_means_is_no_such_loss",),
    ),
    "F19": Fault(
        "kill -9 in a save, at twenty places of two ranks and at every touch of the disk",
        (
            f"{KILLED}::test_killed_at_twenty_places_the_last_verified_counts",
            f"{FOLDER}::test_killed_anywhere_the_newest_is_whole",
            "tests/distributed/test_async_checkpoints.py::test_killed_while_writing_it_goes_on_bit_for_bit",
        ),
        (f"{KILLED}::test_a_save_in_place_would_be_mixed", f"{FOLDER}::test_a_careless_order_would_be_noticed"),
    ),
    "F20": Fault(
        "disk full, short writes, EIO, a disk that keeps other bytes",
        (
            f"{ON}::test_a_full_disk_is_told_and_the_old_checkpoint_is_kept",
            f"{DAMAGE}::test_room_is_asked_for_first",
            f"{DAMAGE}::test_a_write_that_fails_leaves_what_was",
            f"{DAMAGE}::test_a_real_limit_on_files",
            f"{DAMAGE}::test_a_disk_that_keeps_other_bytes_is_found_before_it_counts",
        ),
        (f"{DAMAGE}::test_a_save_in_place_would_lose_the_old_one",),
        speaks=True,
    ),
    "F21": Fault(
        "SIGTERM, SIGINT, SIGUSR1 in tokenising, loading, training, evaluating, saving",
        (
            f"{RECOVERY}::test_a_signal_at_any_time_ends_within_seconds_and_nothing_is_lost",
            f"{RECOVERY}::test_what_has_not_ended_is_ended_and_what_was_saved_before_stands",
        ),
        (f"{ON}::test_without_handlers_a_signal_costs_the_steps_since_the_last_checkpoint",),
    ),
    "F22": Fault(
        "NaN or infinity on one rank",
        (
            f"{HEALTH}::test_a_sick_step_changes_nothing_on_any_rank",
            f"{HEALTH}::test_stop_names_the_row_and_saves_what_was_before",
        ),
        (
            f"{HEALTH}::test_without_the_guard_it_would_be_seen",
            f"{HEALTH}::test_without_the_guard_one_ranks_nan_is_in_every_ranks_weights",
        ),
        speaks=True,
    ),
    "F23": Fault(
        "two runs in one folder, one after the other and at once; a taken port",
        (
            f"{RECOVERY}::test_while_it_runs_it_listens_on_loopback_alone_and_owns_its_folder",
            f"{OWNER}::test_of_runs_that_begin_at_once_one_has_it",
            f"{OWNER}::test_a_killed_owner_has_it_no_more",
            f"{ON}::test_a_taken_port_is_no_obstacle",
        ),
        (
            f"{OFF}[folder_in_use]",
            f"{OWNER}::test_without_the_lock_several_would_have_it",
            f"{ON}::test_a_port_that_is_not_the_kernels_choice_is_one",
        ),
        speaks=True,
    ),
    "F24": Fault(
        "another run's folder: settings, data, rows of a step",
        (f"{ON}::test_another_runs_folder_is_refused_with_what_differs",),
        (f"{ON}::test_without_the_fingerprint_two_runs_would_be_one",),
        speaks=True,
    ),
    "F25": Fault(
        "gone on with on other numbers of ranks",
        (
            f"{RESUME}::test_another_number_of_ranks_takes_the_same_rows",
            "tests/distributed/test_dcp.py::test_another_number_of_ranks_loads_the_same_bits",
        ),
        (f"{RESUME}::test_what_is_not_restored_is_noticed",),
    ),
    "F26": Fault(
        "a file system that shows things late and has stale handles",
        (
            f"{ON}::test_ranks_that_disagree_on_what_is_there_wait_for_one_another",
            f"{DAMAGE}::test_a_shared_file_system_that_is_late",
            f"{DAMAGE}::test_what_never_comes_into_sight_is_an_error",
        ),
        (f"{DAMAGE}::test_without_patience_it_would_be_an_error",),
    ),
    "F27": Fault(
        "the launcher is killed",
        (
            f"{LAUNCH}::test_workers_end_with_a_killed_launcher",
            f"{RECOVERY}::test_a_killed_launcher_leaves_nobody_and_the_same_command_goes_on",
        ),
        (f"{ON}::test_without_the_kernels_word_workers_outlive_their_launcher",),
    ),
    "F28": Fault(
        "numbers: accumulation, ranks, padding, packing, evaluation",
        (
            f"{NUMBERS}::test_step_one_is_transformers_own",
            f"{NUMBERS}::test_eval_loss_is_transformers_token_mean",
            f"{PACKING}::test_logits_do_not_depend_on_neighbours",
            f"{PACKING}::test_packed_gradients_are_the_sum_of_single_ones",
        ),
        (f"{NUMBERS}::test_a_mean_of_means_is_no_such_loss", f"{PACKING}::test_a_document_without_borders_is_noticed"),
    ),
    "F29": Fault(
        "numbers: tokens, ends, dropout, saved adapters, ties, merges, rope",
        (
            "tests/unit/data/test_data_render.py::test_prompts_are_llama_recipes_to_the_character",
            f"{FLAWS}::test_25_every_answer_ends_with_the_models_own_end",
            "tests/unit/peft/test_lora.py::test_dropout_is_by_key_and_layer_name_and_only_in_training",
            "tests/unit/checkpoint/test_adapter.py::test_peft_names_and_loads_what_we_save",
            "tests/unit/model/test_llama.py::test_a_tied_head_has_no_parameter_and_cannot_be_parted",
            "tests/unit/commands/test_export.py::test_merged_logits_are_the_adapted_ones",
            "tests/unit/model/test_rope.py::test_turns_as_transformers_does",
        ),
        (
            "tests/unit/model/test_parity.py::test_the_comparison_can_fail",
            "tests/unit/checkpoint/test_adapter.py::test_what_is_read_back_is_compared",
            f"{NUMBERS}::test_one_wrong_gradient_is_noticed",
        ),
    ),
    "F30": Fault(
        "hostile folders, planted secrets, open ports",
        (
            f"{SECURITY}::test_a_pickle_in_a_files_place_is_never_loaded",
            f"{SECURITY}::test_nor_in_a_data_file",
            f"{SECURITY}::test_nor_anywhere_in_a_checkpoint",
            f"{SECURITY}::test_nor_where_the_manifest_agrees_with_it",
            f"{SECURITY}::test_code_that_a_config_names_is_not_imported",
            f"{SECURITY}::test_a_chat_template_reaches_no_python",
            f"{SECURITY}::test_no_way_out_of_the_folder",
            f"{SECURITY}::test_yaml_constructs_nothing",
            f"{SECURITY}::test_no_secret_is_written_or_said",
            f"{LAUNCH}::test_only_the_first_cause_is_told_and_nothing_listens_outside",
            "tests/distributed/test_figures.py::test_no_process_of_a_run_listens_beyond_loopback",
        ),
        (
            f"{SECURITY}::test_the_payloads_do_run_where_they_are_unpickled",
            f"{SECURITY}::test_the_search_for_secrets_finds_one",
            f"{LAUNCH}::test_a_wildcard_listener_would_be_seen",
        ),
    ),
}


class Figure(NamedTuple):
    """What is measured."""

    what: str
    bar: str
    met: Callable[[str], bool]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def _all(text: str) -> bool:
    """`n of n`."""
    return _numbers(text)[0] == _numbers(text)[1] > 0


def _step(text: str) -> bool:
    """`x ms of a step of y ms`."""
    added, step = _numbers(text)
    return added <= max(10.0, step)


FIGURES: dict[str, Figure] = {
    "M1": Figure("kills recovered from", "30 of 30", lambda text: text == "30 of 30"),
    "M2": Figure("seconds from a kill to the next new step, median", "3", lambda text: float(text) <= 3),
    "M3": Figure("steps done again after a kill, at most", "10, the interval", lambda text: float(text) <= 10),
    "M4": Figure("lines of metrics.jsonl after kills equal to the last bit", "all", _all),
    "M5": Figure("part of the time that is new work, three kills in 32 s", "0.85", lambda text: float(text) >= 0.85),
    "M6": Figure("what a checkpoint adds to its step, median", "10 ms or one step", _step),
    "M7": Figure(
        "a stopped rank is named, beyond the time-out",
        "1 s, all gone 5 s later",
        lambda text: _numbers(text)[0] <= 1 and _numbers(text)[1] <= 5,
    ),
    "M8": Figure("failures whose first line is the cause", "all", _all),
    "M9": Figure("flipped bits noticed", "100 of 100", lambda text: text == "100 of 100"),
    "M10": Figure(
        "from SIGTERM to the end, and steps lost", "2 s, 0", lambda text: _numbers(text)[0] <= 2 and "0 lost" in text
    ),
}

FIGURE_TESTS = (
    "tests/distributed/test_figures.py",
    "tests/unit/checkpoint/test_checkpoint_damage.py::test_100_random_flips_are_100_found",
)

PARTS: dict[str, str] = {
    "where": r"\.(csv|jsonl?|py|safetensors)|--[a-z_]+|rank \d|/\w+",
    "which": r":\d+|\brow |\bline \d|column|tensors? |shard|layer|step \d|process \d|model\.",
    "what": (
        r"found|expected|bytes|not (valid|UTF-8|finite|moved)|then, .* now|\bhas \d|have \d|ended by|in use by|Errno|"
        r"of \d|outside|matches no|missing|alloc|no label|is empty|Error: |pointer"
    ),
    "remedy": (
        r"rename|give |convert|shorten|raise --|set |copy|download|run `|pass |choose|add |there are|make room|"
        r"needs less|--on_\w+|must be|own tokenizer"
    ),
}
"""Points of a message, each as a pattern of what has it."""


class Scores:
    """A pytest plugin that keeps outcomes, messages and figures."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.figures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.said: dict[str, list[tuple[str, bool]]] = {}
        """Test -> each message, and whether its first line is the cause."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst of a test's phases; a skip is not a pass."""
        if report.outcome != "passed" or report.when == "call":
            self.outcomes[report.nodeid] = report.outcome
        if report.when != "call":
            return
        self.seconds[report.nodeid] = report.duration
        told = [(name, str(value)) for name, value in report.user_properties]
        firsts = [value == "1 of 1" for name, value in told if name == "M8"]
        texts = [value for name, value in told if name == "said"]
        self.said[report.nodeid] = list(zip(texts, firsts, strict=True))
        self.figures |= {name: value for name, value in told if name in FIGURES and name != "M8"}

    def _of(self, names: Sequence[str]) -> Iterator[str]:
        return (node for node in self.outcomes for name in names if node == name or node.startswith(f"{name}["))

    def passed(self, wanted: Sequence[str]) -> bool:
        """Whether there are tests of each of these names, and all passed, each in its time."""
        return bool(wanted) and all(
            bool(found := list(self._of([name])))
            and all(self.outcomes[node] == "passed" and self.seconds[node] <= CASE_SECONDS for node in found)
            for name in wanted
        )

    def points(self, fault: Fault) -> int | None:
        """Of the poorest message of a fault that must speak; 0 without any."""
        messages = [pair for node in self._of(fault.holds) for pair in self.said.get(node, [])]
        if not fault.speaks:
            return None
        return min(
            (sum(bool(re.search(part, said)) for part in PARTS.values()) + first for said, first in messages), default=0
        )

    def holds(self, fault: Fault) -> bool:
        """The right outcome, and words that are good enough."""
        points = self.points(fault)
        return self.passed(fault.holds) and (points is None or points >= FEWEST_POINTS)

    def count_first_causes(self, faults: Mapping[str, Fault]) -> None:
        """M8: a fault that must speak and did not counts as one that named another cause."""
        firsts: list[bool] = []
        for fault in (fault for fault in faults.values() if fault.speaks):
            found = [first for node in self._of(fault.holds) for _, first in self.said.get(node, [])]
            firsts += found or [False]
        self.figures["M8"] = f"{sum(firsts)} of {len(firsts)}"


def table(faults: Mapping[str, Fault], scores: Scores) -> list[str]:
    """The scorecard in Markdown."""
    lines = ["| | fault | holds | message, of 5 | guard off: fails | s |", "|---|---|---|---|---|---|"]
    for name, fault in faults.items():
        words = ["pass" if right else "FAIL" for right in (scores.holds(fault), scores.passed(fault.without))]
        seconds = sum(scores.seconds.get(node, 0.0) for node in set(scores._of((*fault.holds, *fault.without))))
        points = scores.points(fault)
        lines.append(
            f"| {name} | {fault.what} | {words[0]} | {'' if points is None else points} | {words[1]} | {seconds:.0f} |"
        )
    lines += ["", "| | figure | bar | measured | |", "|---|---|---|---|---|"]
    for name, figure in FIGURES.items():
        value = scores.figures.get(name)
        word = "pass" if value is not None and figure.met(value) else "FAIL"
        lines.append(f"| {name} | {figure.what} | {figure.bar} | {value or 'none'} | {word} |")
    return lines


def failing(lines: Sequence[str]) -> list[str]:
    """Names of the lines that do not pass."""
    return [line.split("|")[1].strip() for line in lines if "| FAIL |" in line]


def main(argv: Sequence[str]) -> int:
    """Run the scorecard; 0 if all of it passes."""
    names = [test for fault in FAULTS.values() for test in (*fault.holds, *fault.without)]
    scores, began, load = Scores(), time.monotonic(), os.getloadavg()[0]
    names.sort(key=lambda name: name.partition("::")[0])  # a file's tests share what they need
    pytest.main(
        ["--rootdir", str(ROOT), "-m", "not gpu", "-q", *dict.fromkeys([*FIGURE_TESTS, *names])], plugins=[scores]
    )
    scores.count_first_causes(FAULTS)
    lines = table(FAULTS, scores)
    machine = f"{os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} after"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, gloo"
    lines += ["", f"{len(scores.outcomes)} tests in {time.monotonic() - began:.0f} s; {machine}; {versions}."]
    print("\n".join(lines))
    if "--write" in argv:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")
    return 1 if failing(lines) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
