"""Paths and URLs: each character of a name survives the way from one to the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from arc_ds.errors import DataError
from arc_ds.system.urls import join_url, local_path, name_in_url, web_url


@pytest.mark.parametrize("name", ["is it good?", "50%41", "a#b", "x y é", "q?a=1#f%zz"])
def test_a_file_url_is_the_path_that_it_was_made_of(name: str) -> None:
    path = Path("/data") / name
    assert local_path(path.as_uri()) == local_path(path) == path


def test_a_file_url_may_hold_unquoted_characters() -> None:
    assert local_path("file:///data/is it good?#2") == Path("/data/is it good?#2")
    assert local_path("FILE://localhost/data") == Path("/data") and local_path("file:/data") == Path("/data")


def test_a_file_url_with_two_slashes_is_no_other_folder() -> None:
    with pytest.raises(DataError, match=r"names the host data\. .*three slashes: file:///data/shards\."):
        local_path("file://data/shards")


def test_a_file_in_a_folder_keeps_the_folders_name() -> None:
    assert join_url("s3://bucket/run#3/is it?", "a b.tar") == "s3://bucket/run#3/is it?/a b.tar"
    assert join_url("http://host/my data#1?sig=a%2Fb", "a b.tar") == "http://host/my%20data%231/a%20b.tar?sig=a%2Fb"
    assert name_in_url("s3://bucket/a#1.tar") == "a#1.tar" == name_in_url("https://host/x/a%231.tar?sig=/z")


def test_a_request_quotes_what_is_not_quoted_yet() -> None:
    assert web_url("http://host/é%20 50%#1") == "http://host/%C3%A9%20%2050%25%231"
    assert web_url("https://host/a%20b?sig=x%2F&v=1") == "https://host/a%20b?sig=x%2F&v=1"
    assert web_url("s3://bucket/a b#1") == "s3://bucket/a b#1"
