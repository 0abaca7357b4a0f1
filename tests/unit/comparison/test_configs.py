"""Differences of configs, short values, and groups of seeds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arc_ds.comparison.configs import config_differences, fact_differences, group_by_seed, shorten
from tests.helpers.compared_runs import make_run


def run(name: str, **config: str):
    return make_run(name, {}, {"seed": "0", "run_dir": f"/runs/{name}", **config})


def test_only_differing_keys_are_shown_and_names_of_runs_are_not() -> None:
    runs = [run("a", lr="0.1", steps="9"), run("b", lr="0.2", steps="9", new="x")]
    assert config_differences(runs) == {"lr": ["0.1", "0.2"], "new": ["–", "x"]}


def test_a_run_without_a_config_makes_no_differences() -> None:
    assert config_differences([run("a", lr="0.1"), make_run("b", {}, {})]) == {}


def test_facts_that_differ_are_shown() -> None:
    runs = [make_run(name, {}, facts={"host": name, "device": "cpu"}) for name in "ab"]
    assert fact_differences(runs) == {"host": ["a", "b"]}
    jobs = [make_run(name, {}, facts={"slurm_job": name}) for name in "ab"]
    assert fact_differences(jobs) == {}


def test_runs_that_differ_in_the_seed_only_are_a_group() -> None:
    runs = [
        run("lr1_seed0", lr="0.1", **{"tracking.run_name": "x"}),
        run("lr2", lr="0.2"),
        run("lr1_seed1", lr="0.1", seed="1"),
    ]
    groups = group_by_seed(runs, config_differences(runs))
    assert [(group.label, group.members) for group in groups] == [("lr1 (2 seeds)", (0, 2)), ("lr2", (1,))]
    again = [run("first"), run("again")]
    assert [group.label for group in group_by_seed(again, config_differences(again))] == ["first (2 runs)"]


def test_settings_that_do_not_change_results_come_last_and_split_no_group() -> None:
    runs = [run("a", **{"checkpoint.every": "5"}), run("b", seed="1", lr="9", **{"checkpoint.every": "6"})]
    runs += [run("c", seed="2", lr="9", **{"checkpoint.every": "7"})]
    differences = config_differences(runs)
    assert list(differences) == ["lr", "seed", "checkpoint.every"]
    assert [group.members for group in group_by_seed(runs, differences)] == [(0,), (1, 2)]


PLACES = {
    "encoder.backbone": ("/a/llama", "/b/llama"),
    "data.sources.0.path": ("/a/wiki", "/b/wiki"),
    "data.validation": ("/a/held", "/b/held"),
}


def test_paths_are_noise_only_if_the_digests_of_all_runs_are_known() -> None:
    known = {"digest.encoder.backbone": "1", "digest.wiki": "2", "digest.held-out": "3"}
    runs = [run(name, **{key: pair[idx] for key, pair in PLACES.items()}, **known) for idx, name in enumerate("ab")]
    assert config_differences(runs) == {}
    other = run("c", **{key: pair[0] for key, pair in PLACES.items()}, **{**known, "digest.encoder.backbone": "4"})
    assert config_differences([*runs, other]) == {"digest.encoder.backbone": ["1", "1", "4"]}
    unknown = [run(name, **{key: pair[idx] for key, pair in PLACES.items()}) for idx, name in enumerate("ab")]
    assert set(config_differences(unknown)) == set(PLACES)
    assert set(config_differences([runs[0], unknown[1]])) == {*PLACES, *known}
    for digest, place in zip(known, PLACES, strict=True):
        part = [replace(each, config={k: v for k, v in each.config.items() if k != digest}) for each in runs]
        assert config_differences(part).keys() == {place}
    assert len(group_by_seed(unknown, config_differences(unknown))) == 2


def test_runs_without_configs_are_never_a_group() -> None:
    runs = [make_run("a", {}, {}), make_run("b", {}, {})]
    assert [group.members for group in group_by_seed(runs, {})] == [(0,), (1,)]


def test_groups_of_one_label_are_told_apart() -> None:
    runs = [run("x_s0", lr="1"), run("x_s1", lr="1", seed="1"), run("x_s2", lr="2"), run("x_s3", lr="2", seed="1")]
    labels = [group.label for group in group_by_seed(runs, config_differences(runs))]
    assert labels == ["x (2 seeds) [x_s0]", "x (2 seeds) [x_s2]"]


def test_short_values_stay_as_they_are() -> None:
    assert shorten(["0.1", "0.2"]) == ["0.1", "0.2"]


def test_long_paths_keep_the_part_that_differs() -> None:
    values = [f"/data/projects/arc/shards/wikipedia-{year}/train/part" for year in (2025, 2026)]
    assert shorten(values) == ["…2025…", "…2026…"]


@pytest.mark.parametrize(
    "values",
    [
        ["a" * 100, "a" * 101],
        ["x" * 50 + "1" + "y" * 50, "x" * 50 + "2" + "y" * 50],
        ["/very/long/path/" * 5 + "a", "–", "/very/long/path/" * 5 + "a", "short"],
        ["/very/long/path/" * 5, "/very/long/path/" * 4],
    ],
)
def test_different_values_stay_different_and_equal_ones_equal(values: list[str]) -> None:
    short = shorten(values)
    for one, one_short in zip(values, short, strict=True):
        assert len(one_short) <= 48
        for other, other_short in zip(values, short, strict=True):
            assert (one == other) == (one_short == other_short)
