"""A run that does not fit on its disks is refused."""

import pytest

from puzzle_core.errors import StorageError
from tasks.runtime.disk_space import check_disk_space


@pytest.mark.parametrize(
    ("scratch", "store", "key"), [(2**60, 0, "runtime.scratch"), (0, 2**60, "runtime.store")], ids=["scratch", "store"]
)
def test_a_run_that_a_disk_cannot_hold_is_refused_with_what_it_needs_and_where(context_of, scratch, store, key):
    context = context_of()
    check_disk_space(context, 2**10, 2**10)
    place = getattr(context.runtime, key.removeprefix("runtime."))
    with pytest.raises(
        StorageError, match=rf"^{place} has [\d,]+ MiB free, .* 1,099,511,627,776 MiB .*or set {key} to"
    ):
        check_disk_space(context, scratch, store)


def test_a_remote_store_is_not_asked_for_room(context_of):
    check_disk_space(context_of(store="memory://artifacts"), 0, 2**60)


def test_a_place_that_cannot_be_a_directory_is_named(context_of, tmp_path):
    (tmp_path / "scratch").write_text("a file")
    with pytest.raises(StorageError, match=rf"cannot make the directory {tmp_path}/scratch .*: set runtime.scratch"):
        check_disk_space(context_of(), 0, 0)
